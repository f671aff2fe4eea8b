#include "../../launcher/src/open_mpi.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep::launcher {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::IsSupersetOf;
using testing::Key;
using testing::Not;
using testing::Pair;

const Environment kNothingSet = [](const char*) { return std::nullopt; };

MpirunStart on_two_hosts() {
  return {.mpirun = "/usr/bin/mpirun",
          .placement = {{{"a", 4}, {"b", 2}}, {}},
          .on_this_machine = false,
          .cores = 4,
          .hostfile = "/launch/hostfile"};
}

TEST(OpenMpi, SilentHostsAreFoundWithBothVersions) {
  const auto settings = open_mpi_environment(on_two_hosts(), kNothingSet);
  for (const char* prefix : {"OMPI_MCA_", "PRTE_MCA_"}) {
    EXPECT_EQ(settings.at(std::string(prefix) + "oob_tcp_keepalive_time"), "3");
    EXPECT_EQ(settings.at(std::string(prefix) + "oob_tcp_keepalive_intvl"), "1");
    EXPECT_EQ(settings.at(std::string(prefix) + "oob_tcp_keepalive_probes"), "3");
  }
  EXPECT_EQ(settings.at("OMPI_MCA_btl"), "self,vader,tcp");
  EXPECT_THAT(settings, Not(Contains(Key("OMPI_MCA_plm"))));
  EXPECT_THAT(settings, Not(Contains(Key("OMPI_MCA_mpi_yield_when_idle")))) << "each rank has a core";
}

TEST(OpenMpi, OnOneMachineThereIsNoNetworkAndFilesLieWhereTheyAreSwept) {
  MpirunStart start = on_two_hosts();
  start.on_this_machine = true;
  start.placement = {{{"localhost", 8}}, {}};
  start.session = "/tmp/s", start.shared_memory = "/dev/shm/s";
  EXPECT_THAT(
      open_mpi_environment(start, kNothingSet),
      IsSupersetOf({Pair("OMPI_MCA_btl", "self,vader"), Pair("OMPI_MCA_plm", "isolated"),
                    Pair("OMPI_MCA_orte_tmpdir_base", "/tmp/s"), Pair("PRTE_MCA_prte_tmpdir_base", "/tmp/s"),
                    Pair("OMPI_MCA_btl_vader_backing_directory", "/dev/shm/s"),
                    Pair("OMPI_MCA_btl_sm_backing_directory", "/dev/shm/s"), Pair("OMPI_MCA_mpi_yield_when_idle", "1"),
                    Pair("OMPI_MCA_hwloc_base_binding_policy", "none")}));
}

TEST(OpenMpi, BindingIsTheUsersDecision) {
  MpirunStart start = on_two_hosts();
  start.bind_to_cores = true;
  EXPECT_THAT(open_mpi_environment(start, kNothingSet),
              IsSupersetOf({Pair("OMPI_MCA_hwloc_base_binding_policy", "core"),
                            Pair("PRTE_MCA_hwloc_default_binding_policy", "core")}));
}

TEST(OpenMpi, WhatTheUserSetStays) {
  const Environment user = [](const char* name) {
    return std::string(name) == "OMPI_MCA_btl" ? std::optional<std::string>("self") : std::nullopt;
  };
  EXPECT_THAT(open_mpi_environment(on_two_hosts(), user), Not(Contains(Key("OMPI_MCA_btl"))));
}

TEST(OpenMpi, TheCommandHoldsNamesAndNoValues) {
  EXPECT_THAT(mpirun_command(on_two_hosts(), {"OMP_NUM_THREADS"}),
              ElementsAre("/usr/bin/mpirun", "-n", "6", "--hostfile", "/launch/hostfile", "-x", "OMP_NUM_THREADS"));
  EXPECT_EQ(hostfile_text(on_two_hosts().placement), "a slots=4\nb slots=2\n");
}

TEST(OpenMpi, OnlyVariablesOfTheListLeaveThisMachineAndNoSecrets) {
  const char* environment[] = {"PATH=/bin",
                               "AWS_SECRET_ACCESS_KEY=x",
                               "LOCKSTEP_TOKEN=x",
                               "NCCL_DEBUG=INFO",
                               "OMP_NUM_THREADS=1",
                               "UCX_TLS=tcp",
                               "HOME=/root",
                               "LD_LIBRARY_PATH=/lib",
                               "LOCKSTEP_SEED=5=6",
                               "WANDB_API_KEY=x",
                               "NCCL_AUTH=x",
                               "OMPI_MCA_btl=tcp",
                               nullptr};
  EXPECT_THAT(forwarded_variables(environment),
              ElementsAre("LD_LIBRARY_PATH", "LOCKSTEP_SEED", "NCCL_DEBUG", "OMP_NUM_THREADS", "UCX_TLS"));
}

TEST(OpenMpi, TheAgentIsTheOneMpirunUses) {
  EXPECT_THAT(remote_agent(kNothingSet, false), ElementsAre("ssh", "-o", "BatchMode=yes"));
  EXPECT_EQ(remote_agent(kNothingSet, true)[0], "srun");
  const auto agent = [](const char* variable, const char* value) {
    return remote_agent(
        [=](const char* name) {
          return std::string(name) == variable ? std::optional<std::string>(value) : std::nullopt;
        },
        false);
  };
  EXPECT_THAT(agent("OMPI_MCA_plm_rsh_agent", "/lab/rsh"), ElementsAre("/lab/rsh"));
  EXPECT_THAT(agent("PRTE_MCA_plm_ssh_agent", "/lab/rsh -q"), ElementsAre("/lab/rsh", "-q"));
  EXPECT_THAT(agent("OMPI_MCA_plm_rsh_agent", "ssh -p 22 : rsh"),
              ElementsAre("ssh", "-p", "22", "-o", "BatchMode=yes"));
}

TEST(OpenMpi, TheNetworkOfAHostIsFound) {
  EXPECT_EQ(network_to("127.0.0.1"), "127.0.0.0/8");
  EXPECT_EQ(network_to("no.such.host.invalid"), "");
}

TEST(OwnAddressTo, IsTheOneThatLeadsThere) {
  EXPECT_EQ(own_address_to("127.0.0.1"), "127.0.0.1");
  EXPECT_EQ(own_address_to("no such host"), "");
}

}  // namespace
}  // namespace lockstep::launcher
