#include <map>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/rank_info.h>

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Variables = std::map<std::string, std::string>;

Environment environment(const Variables& variables) {
  return [variables](const char* name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  };
}

RankInfo read(const Variables& variables) { return rank_info_from_environment(environment(variables)); }

std::string refusal(const Variables& variables) {
  try {
    read(variables);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "taken";
}

const Variables kMpirun = {{"OMPI_COMM_WORLD_RANK", "5"},
                           {"OMPI_COMM_WORLD_SIZE", "7"},
                           {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                           {"OMPI_COMM_WORLD_LOCAL_SIZE", "3"},
                           {"OMPI_COMM_WORLD_NODE_RANK", "1"}};
const Variables kSrun = {{"SLURM_PROCID", "9"},
                         {"SLURM_NTASKS", "11"},
                         {"SLURM_LOCALID", "1"},
                         {"SLURM_NODEID", "2"},
                         {"SLURM_STEP_ID", "0"},
                         {"PMIX_RANK", "9"},
                         {"SLURM_STEP_TASKS_PER_NODE", "4(x2),3"}};
const Variables kTorchrun = {
    {"RANK", "3"}, {"WORLD_SIZE", "4"}, {"LOCAL_RANK", "1"}, {"LOCAL_WORLD_SIZE", "2"}, {"GROUP_RANK", "1"}};

TEST(RankInfoTest, AProcessAloneIsRankZeroOfOne) {
  const RankInfo info = read({});
  EXPECT_EQ(info.rank, 0);
  EXPECT_EQ(info.world_size, 1);
  EXPECT_EQ(info.local_size, 1);
  EXPECT_EQ(info.launcher, "none");
  EXPECT_FALSE(info.has_mpi);
}

TEST(RankInfoTest, OpenMpiSaysWhoWeAre) {
  const RankInfo info = read(kMpirun);
  EXPECT_EQ(info.rank, 5);
  EXPECT_EQ(info.world_size, 7);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.local_size, 3);
  EXPECT_EQ(info.node_rank, 0) << "OMPI_COMM_WORLD_NODE_RANK is no number of a node";
  EXPECT_EQ(info.launcher, "mpirun");
  EXPECT_TRUE(info.has_mpi);
}

TEST(RankInfoTest, SlurmSaysWhoWeAreAndUnfoldsItsTasksPerNode) {
  const RankInfo info = read(kSrun);
  EXPECT_EQ(info.rank, 9);
  EXPECT_EQ(info.world_size, 11);
  EXPECT_EQ(info.local_rank, 1);
  EXPECT_EQ(info.local_size, 3);
  EXPECT_EQ(info.node_rank, 2);
  EXPECT_EQ(info.launcher, "srun");
  Variables first_node = kSrun;
  first_node["SLURM_NODEID"] = "1";
  EXPECT_EQ(read(first_node).local_size, 4);
}

TEST(RankInfoTest, TorchrunSaysWhoWeAreAndHasNoMpi) {
  const RankInfo info = read(kTorchrun);
  EXPECT_EQ(info.rank, 3);
  EXPECT_EQ(info.world_size, 4);
  EXPECT_EQ(info.local_size, 2);
  EXPECT_EQ(info.node_rank, 1);
  EXPECT_EQ(info.launcher, "torchrun");
  EXPECT_FALSE(info.has_mpi);
}

TEST(RankInfoTest, TheInnerLauncherWins) {
  Variables both = kSrun;
  both.insert(kMpirun.begin(), kMpirun.end());
  EXPECT_EQ(read(both).launcher, "mpirun") << "mpirun inside an sbatch";
  both = kSrun;
  both.insert(kTorchrun.begin(), kTorchrun.end());
  EXPECT_EQ(read(both).launcher, "torchrun") << "srun starts torchrun";
}

TEST(RankInfoTest, AShellInsideAnAllocationIsNoRank) {
  Variables shell = kSrun;
  shell.erase("SLURM_STEP_ID");
  shell.erase("PMIX_RANK");
  EXPECT_EQ(read(shell).launcher, "none");
}

TEST(RankInfoTest, WhatCannotBeIsRefusedByNameWithAMend) {
  Variables changed = kMpirun;
  for (const char* value : {"", "three", "-1", "5x", "99999999999"}) {
    changed["OMPI_COMM_WORLD_RANK"] = value;
    EXPECT_THAT(refusal(changed), AllOf(HasSubstr("OMPI_COMM_WORLD_RANK"), HasSubstr("Mend"))) << "'" << value << "'";
  }
  changed["OMPI_COMM_WORLD_RANK"] = "7";  // of 7
  EXPECT_THAT(refusal(changed), AllOf(HasSubstr("OMPI_COMM_WORLD_RANK=7"), HasSubstr("OMPI_COMM_WORLD_SIZE=7")));
  changed = kTorchrun;
  changed["LOCAL_RANK"] = "2";  // of 2
  EXPECT_THAT(refusal(changed), HasSubstr("local 2 of 2"));
}

TEST(RankInfoTest, LonelyWorldsAreRefused) {
  RankInfo info = read(kMpirun);
  EXPECT_NO_THROW(check_world(info, 5, 7));
  EXPECT_THROW(check_world(info, 0, 1), ConfigError) << "MPI of another build sees itself alone";
  EXPECT_THROW(check_world(info, 4, 7), ConfigError);
  EXPECT_NO_THROW(check_world(RankInfo{}, 0, 1));
}

}  // namespace
}  // namespace lockstep
