#include <algorithm>
#include <array>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>

#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../runtime/base/temp_dir.h"
#include "lockstep_process.h"

namespace lockstep {
namespace {

using testing::HasSubstr;
using testing::Not;

std::vector<std::string> job(int ranks, const std::vector<std::string>& program) {
  std::vector<std::string> words = {"run", "-n", std::to_string(ranks), "--restarts", "0", "--", kRank};
  words.insert(words.end(), program.begin(), program.end());
  return words;
}

class RunTest : public testing::TestWithParam<int> {};  // world size

TEST_P(RunTest, TheExitCodeOfTheLastRankIsPassedOn) {
  const TempDir folder;
  const std::string last = std::to_string(GetParam() - 1);
  const Ended ended = lockstep_run(job(GetParam(), {"exit", folder.path(), last, "37"}));
  EXPECT_EQ(ended.code, 37) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("exit code 37"));
  if (GetParam() > 1) {
    EXPECT_THAT(ended.err, HasSubstr("first failure: rank " + last + " ended with exit code 37"));
  }
}

TEST_P(RunTest, ARunThatGoesWellSaysNothingOfItsOwnButWhereItsRanksAre) {
  const TempDir folder;
  const Ended ended = lockstep_run(job(GetParam(), {"exit", folder.path(), "99", "0"}));
  EXPECT_EQ(ended.code, 0) << ended.err;
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  const std::string last = std::to_string(GetParam() - 1);
  EXPECT_EQ(ended.err, GetParam() == 1 ? "" : "lockstep: ranks 0-" + last + " on " + host.data() + "\n");
}

INSTANTIATE_TEST_SUITE_P(WorldSizes, RunTest, testing::Values(1, 2, 3, 4, 7, 8));

// After MPI_Abort, Open MPI 4.1.4 loses its own report in some runs (ORTE_ERROR_LOG in show_help.c, plain mpirun too),
// so nothing is expected of `said` there; our programs log their ERROR first, which is the case "error".
struct Death {
  std::string deed;
  int number, code;
  std::string said;  // at the end, with three ranks
  friend void PrintTo(const Death& death, std::ostream* out) { *out << death.deed << ' ' << death.number; }
};
class DeathTest : public testing::TestWithParam<Death> {};

TEST_P(DeathTest, TheCodeSaysWhatToDoNextAndTheEndNamesTheFirstFailure) {
  const auto& [deed, number, code, said] = GetParam();
  for (const int ranks : {1, 3}) {
    const TempDir folder;
    const std::string who = std::to_string(ranks - 1);
    const Ended ended = lockstep_run(job(ranks, {deed, folder.path(), who, std::to_string(number)}));
    EXPECT_EQ(ended.code, code) << ranks << " ranks: " << ended.err;
    if (ranks > 1 && !said.empty()) {
      EXPECT_THAT(ended.err, HasSubstr("first failure: " + said)) << ended.err;
    }
    EXPECT_EQ(ended.err.find("run the same command again") != std::string::npos, code == 75) << ended.err;
  }
}

INSTANTIATE_TEST_SUITE_P(Ways, DeathTest,
                         testing::Values(Death{"abort", 65, 65, ""}, Death{"abort", 73, 73, ""},
                                         Death{"error", 74, 74, "[rank 2/9] disk.cc:7] the disk of rank 2 is full"},
                                         Death{"exit", 75, 75, "rank 2 ended with exit code 75"},
                                         Death{"signal", SIGKILL, 75, "rank 2 died by signal 9"},
                                         Death{"signal", SIGTERM, 75, "rank 2 died by signal 15"},
                                         Death{"signal", SIGSEGV, 70, "rank 2 died by signal 11"},
                                         Death{"signal", SIGABRT, 70, "rank 2 died by signal 6"},
                                         Death{"signal", SIGFPE, 70, "rank 2 died by signal 8"}),
                         [](const auto& instance) {
                           return instance.param.deed + std::to_string(instance.param.number);
                         });

TEST(Run, ArgumentsArriveAsTheyWereGiven) {
  for (const int ranks : {1, 2}) {
    const Ended ended = lockstep_run(job(ranks, {"say", "/", "two words", "", "$HOME;`x`", "--help", "--"}));
    EXPECT_EQ(ended.code, 0) << ended.err;
    for (const char* line : {"3: <two words>", "4: <>", "5: <$HOME;`x`>", "6: <--help>", "7: <-->"})
      EXPECT_THAT(ended.out, HasSubstr(line)) << ranks << " ranks";
  }
}

TEST(Run, ThreadsOfOpenMpAreOneUnlessSet) {
  EXPECT_THAT(lockstep_run(job(2, {"say", "/"})).out, HasSubstr("OMP_NUM_THREADS=1\n"));
  EXPECT_THAT(lockstep_run(job(2, {"say", "/"}), {{"OMP_NUM_THREADS", "5"}}).out, HasSubstr("OMP_NUM_THREADS=5\n"));
}

TEST(Run, AProgramAloneForgetsTheLauncherAroundIt) {
  const Ended ended =
      lockstep_run(job(1, {"say", "/"}), {{"RANK", "3"}, {"WORLD_SIZE", "4"}, {"OMPI_COMM_WORLD_SIZE", "9"}});
  EXPECT_THAT(ended.out, HasSubstr("\nWORLD_SIZE=(unset)"));
  EXPECT_THAT(ended.out, HasSubstr("OMPI_COMM_WORLD_SIZE=(unset)"));
}

TEST(Run, TaggedLinesNameTheirRank) {
  const Ended ended = lockstep_run({"run", "-n", "2", "--tag_output", "--", kRank, "say", "/"});
  EXPECT_THAT(ended.out, HasSubstr("[1,0]<stdout>:"));
  EXPECT_THAT(ended.out, HasSubstr("[1,1]<stdout>:"));
}

TEST(Run, WithoutANumberItSaysHowManyRanksItStarts) {
  const Ended ended = lockstep_run({"run", "--", kRank, "say", "/"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("one a core"));
}

TEST(Run, NoisyStandardErrorArrivesWhole) {
  const Ended ended = lockstep_run({"run", "-n", "2", "--", "/bin/sh", "-c", "seq 20000 >&2"});
  EXPECT_EQ(ended.code, 0);
  EXPECT_EQ(std::count(ended.err.begin(), ended.err.end(), '\n'), 40001) << "the ranks' lines, and where they are";
  EXPECT_THAT(ended.err, Not(HasSubstr("first failure")));
}

TEST(Run, WhatTheMachineLacksIsToldAndTheRunGoesOn) {
  const std::string lockstep = LOCKSTEP_BINARY_DIR "/bin/lockstep";
  const Ended ended = lockstep_run(
      {"run", "-n", "1", "--", "/bin/sh", "-c", "ulimit -n 512; exec " + lockstep + " run -n 1 -- /bin/true"});
  EXPECT_EQ(ended.code, 0);
  EXPECT_EQ(ended.err, "BAD   open files: limit 512\n      mend: ulimit -n 4096\n");
}

TEST(Run, ARunDirectoryThatCannotBeMadeEndsItBeforeAnyRankStarts) {
  const TempDir folder;
  std::ofstream(folder / "file") << "no folder";
  const std::string run_dir = folder / "file" + "/run";
  const Ended ended = lockstep_run(job(2, {"exit", folder.path(), "99", "0", "--run_dir=" + run_dir}));
  EXPECT_EQ(ended.code, 78) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("BAD   storage of " + run_dir + ": creating '" + folder.path() + "/file/"));
  EXPECT_THAT(ended.err, HasSubstr("mend: name a folder you may write with --run_dir"));
  EXPECT_FALSE(std::filesystem::exists(folder / "pid.0"));
}

TEST(Run, ARunDirectoryThatIsNotThereYetIsLookedForWhereItWillBe) {
  const TempDir folder;
  const Ended ended =
      lockstep_run(job(1, {"exit", folder.path(), "99", "0", "--run_dir=" + (folder / "not/yet/there")}));
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(ended.err, "");
}

TEST(Run, AnMpirunThatRefusesIsAMatterOfSetUp) {
  const TempDir folder;  // the user's own setting wins, and no slots are left for the second rank
  const Ended ended = lockstep_run(job(64, {"say", "/"}), {{"OMPI_MCA_rmaps_base_oversubscribe", "0"}});
  EXPECT_EQ(ended.code, 78) << ended.err;
}

}  // namespace
}  // namespace lockstep
