// Jobs that are started again, with the real mpirun and small programs for ranks: when, how often, and that nothing of
// one start is left when the next begins.
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>

#include <sys/stat.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../runtime/base/temp_dir.h"
#include "lockstep_process.h"

namespace lockstep {
namespace {

namespace files = std::filesystem;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::IsSubsetOf;
using testing::Not;

std::vector<std::string> job(int ranks, const std::string& deed, const TempDir& folder, int who, int number,
                             const std::vector<std::string>& flags = {}) {
  std::vector<std::string> words = {"run", "-n", std::to_string(ranks)};
  words.insert(words.end(), flags.begin(), flags.end());
  words.insert(words.end(), {"--", kRank, deed, folder.path(), std::to_string(who), std::to_string(number)});
  return words;
}

int64_t starts(const TempDir& folder) {
  std::error_code error;
  const auto size = files::file_size(folder / "starts", error);
  return error ? 0 : static_cast<int64_t>(size);
}

// What launchers leave in the places they share: files of ours and of Open MPI.
std::set<std::string> leftovers(const std::string& temporary) {
  std::set<std::string> found;
  for (const std::string& parent : {temporary, std::string("/dev/shm")}) {
    for (const auto& entry : files::directory_iterator(parent)) {
      const std::string name = entry.path().filename();
      struct stat status {};
      if (::lstat(entry.path().c_str(), &status) != 0 || status.st_uid != ::geteuid()) continue;
      if (parent == temporary || name.find("_segment.") != std::string::npos || name.starts_with("lockstep-"))
        found.insert(entry.path());
    }
  }
  return found;
}

TEST(Restart, AKilledRankCostsAMoment) {
  for (const int ranks : {1, 3}) {
    const TempDir folder;
    const Ended ended = lockstep_run(job(ranks, "recover", folder, ranks - 1, 1));
    EXPECT_EQ(ended.code, 0) << ended.err;
    EXPECT_EQ(starts(folder), 2);
    EXPECT_THAT(ended.err, HasSubstr("died by signal 9"));
    EXPECT_THAT(ended.err, HasSubstr("starting again, restart 1 of 3"));
    EXPECT_FALSE(files::exists("run")) << "which the program did not make";
  }
}

TEST(Restart, WhenTheBudgetIsSpentTheCodeSaysSoAndAllFailuresAreTold) {
  const TempDir folder;
  const Ended ended = lockstep_run(job(2, "recover", folder, 1, 99, {"--restarts", "1"}));
  EXPECT_EQ(ended.code, 77) << ended.err;
  EXPECT_EQ(starts(folder), 2);
  EXPECT_THAT(ended.err, HasSubstr("first failure of start 2: rank 1 died by signal 9"));
  EXPECT_THAT(ended.err, HasSubstr("all 1 restarts are spent"));
  EXPECT_THAT(ended.err, Not(HasSubstr("run the same command again"))) << "scripts would";
}

TEST(Restart, WithoutRestartsThereIsOneStart) {
  const TempDir folder;
  EXPECT_EQ(lockstep_run(job(2, "recover", folder, 1, 99, {"--restarts", "0"})).code, 75);
  EXPECT_EQ(starts(folder), 1);
}

TEST(Restart, TheSameCrashAtTheSameStepTwiceIsNotTriedAgain) {
  for (const int ranks : {1, 2}) {
    const TempDir folder;
    const Ended ended = lockstep_run(job(ranks, "crash", folder, 0, 0));
    EXPECT_EQ(ended.code, 70) << ended.err;
    EXPECT_EQ(starts(folder), 2);
    EXPECT_THAT(ended.err, HasSubstr("rank 0 died by signal 6 (Aborted) at step 7"));
    EXPECT_THAT(ended.err, HasSubstr("the same failure came twice (signal 6 at step 7)"));
  }
}

TEST(Restart, WhatARankWroteDownIsTheFirstFailure) {
  const TempDir folder;
  const Ended ended = lockstep_run(job(3, "record", folder, 2, 65));
  EXPECT_EQ(ended.code, 65) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("first failure: rank 2: the disk of rank 2 is full"));
}

TEST(Restart, AStopWhileItWaitsEndsIt) {
  const TempDir folder;
  LockstepProcess process(job(2, "record", folder, 1, 74));
  for (int i = 0; i < 2000 && process.err().find("starting again in") == std::string::npos; ++i) usleep(10'000);
  process.send(SIGTERM);
  EXPECT_EQ(process.wait(), 75) << process.err();
}

TEST(Restart, ALauncherThatFollowsAKilledOneKeepsItsBudgetAndEndsItsRanks) {
  const TempDir folder, run;
  auto words = job(2, "stay", folder, 0, 0, {"--restarts", "2"});
  words.push_back("--run_dir=" + run.path());
  auto first = std::make_unique<LockstepProcess>(words);
  auto pids = wait_for_ranks(folder.path(), 2);
  ASSERT_TRUE(pids) << first->err();
  files::remove(folder / "pid.0");
  ::kill(pids->back(), SIGKILL);  // the first restart
  pids = wait_for_ranks(folder.path(), 2);
  ASSERT_TRUE(pids) << first->err();
  EXPECT_TRUE(files::exists(run / "launch/supervisor.json"));
  first->send(SIGKILL);
  EXPECT_EQ(first->wait(), 1000 + SIGKILL);
  for (const char* name : {"pid.0", "pid.1"}) files::remove(folder / name);
  LockstepProcess second(words);  // at once: ranks of the first may still be there
  const auto new_pids = wait_for_ranks(folder.path(), 2);
  ASSERT_TRUE(new_pids) << second.err();
  EXPECT_TRUE(are_gone(*pids, 0)) << "of the first launcher, when ranks of the second run";
  EXPECT_THAT(second.err(), HasSubstr("1 of 2 restarts are used"));
  second.send(SIGINT);
  usleep(100'000);
  second.send(SIGINT);
  EXPECT_EQ(second.wait(), 75) << second.err();
  EXPECT_TRUE(files::is_empty(run.path())) << "launch/ is left";
}

TEST(Restart, TwoLaunchersOnOneRunDirectoryAreTwoJobs) {
  const TempDir folder, other, run;
  auto words = job(2, "stay", folder, 0, 0);
  words.push_back("--run_dir=" + run.path());
  LockstepProcess first(words);
  ASSERT_TRUE(wait_for_ranks(folder.path(), 2)) << first.err();
  auto second = job(2, "say", other, 0, 0);
  second.push_back("--run_dir=" + run.path());
  const Ended ended = lockstep_run(second);
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(ended.err.find("going on"), std::string::npos) << ended.err;
  EXPECT_TRUE(files::exists(run / "launch/supervisor.json")) << "the first one's";
  first.send(SIGINT);
  usleep(100'000);
  first.send(SIGINT);
  EXPECT_EQ(first.wait(), 75) << first.err();
}

TEST(Restart, AProcessThatHidesIsEndedWithTheJob) {
  for (const int ranks : {1, 2}) {
    const TempDir folder;
    EXPECT_EQ(lockstep_run(job(ranks, "daemon", folder, ranks - 1, 0)).code, 0);
    pid_t pid = 0;
    std::ifstream(folder / "pid.daemon") >> pid;
    ASSERT_GT(pid, 0);
    EXPECT_TRUE(are_gone({pid}, 0));
  }
}

// In a script of `submit` TERM is blocked, in mpirun too.
TEST(Restart, RanksEndWithTheirLauncherWhereTermIsBlocked) {
  const TempDir folder;
  sigset_t term, before;
  ::sigemptyset(&term);
  ::sigaddset(&term, SIGTERM);
  ::pthread_sigmask(SIG_BLOCK, &term, &before);
  LockstepProcess process(job(2, "stay", folder, 0, 0));
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  const auto pids = wait_for_ranks(folder.path(), 2);
  ASSERT_TRUE(pids) << process.err();
  process.send(SIGKILL);
  EXPECT_TRUE(are_gone(*pids, 5));
  lockstep_run({"run", "--", "/bin/true"});  // sweeps
}

// T14.
TEST(Restart, KillsLeaveNothing) {
  const int cycles = std::getenv("LOCKSTEP_DEEP") ? 100 : 20;
  const TempDir folder, temporary;
  const auto before = leftovers(temporary.path());
  const auto ports_before = listening_ports();
  const auto words = job(3, "stay", folder, 0, 0, {"--restarts", "1"});
  for (int cycle = 0; cycle < cycles; ++cycle) {
    for (int rank = 0; rank < 3; ++rank) files::remove(folder / "pid." + std::to_string(rank));
    LockstepProcess process(words, {{"TMPDIR", temporary.path()}});
    const auto pids = wait_for_ranks(folder.path(), 3);
    ASSERT_TRUE(pids) << process.err();
    EXPECT_THAT(listening_ports(), Not(IsSubsetOf(ports_before))) << "mpirun's, or nothing is looked at";
    const int who = cycle % 3;
    if (who == 0) process.send(SIGKILL);
    if (who == 1) process.kill_child();
    if (who == 2) ::kill((*pids)[cycle % 3], SIGKILL);
    if (who != 0) {
      for (int i = 0; i < 2000 && process.err().find("restart 1 of 1") == std::string::npos; ++i) usleep(10'000);
      process.send(SIGKILL);
    }
    process.wait();
    EXPECT_TRUE(are_gone(*pids, 10));
  }
  EXPECT_EQ(lockstep_run({"run", "-n", "2", "--", "/bin/true"}, {{"TMPDIR", temporary.path()}}).code, 0);
  EXPECT_EQ(leftovers(temporary.path()), before);
  becomes_true(10, [&] { return testing::Value(listening_ports(), IsSubsetOf(ports_before)); });  // of what was killed
  EXPECT_THAT(listening_ports(), IsSubsetOf(ports_before));
}

TEST(Restart, StartsLeaveNoOpenFilesInTheLauncher) {
  const TempDir folder;
  LockstepProcess process(job(2, "stay", folder, 0, 0));
  int files_of_first = 0;
  for (int start = 0; start < 3; ++start) {
    const auto pids = wait_for_ranks(folder.path(), 2);
    ASSERT_TRUE(pids) << process.err();
    if (start == 0) files_of_first = process.open_files();
    EXPECT_TRUE(becomes_true(5, [&] { return process.open_files() <= files_of_first; }))
        << process.open_files() << " files in start " << start << ", " << files_of_first << " in the first";
    for (int rank = 0; rank < 2; ++rank) files::remove(folder / "pid." + std::to_string(rank));
    ::kill(pids->back(), SIGKILL);
  }
}

class HostsTest : public testing::Test {
 protected:
  // Runs commands for "other hosts" here; those named in FOLDER/gone do not answer.
  HostsTest() {
    write_agent("grep -qx \"$host\" '" + folder_.path() + "/gone' 2>/dev/null && exit 255");
    ::chmod(agent().c_str(), 0700);
  }
  // `deed` comes before what is to run on $host. Each host has a place for temporary files of its own: Open MPI's
  // daemons make folders there, and two that make one at the same moment fail.
  void write_agent(const std::string& deed) const {
    std::ofstream(agent()) << "#!/bin/sh\nhost=$1; shift\nexport TMPDIR='" << folder_.path() << "'/tmp.$host\n"
                           << "mkdir -p \"$TMPDIR\"\n"
                           << deed << "\nexec /bin/sh -c \"$*\"\n";
  }
  std::string agent() const { return folder_ / "agent"; }
  void lose(const std::string& host) const { std::ofstream(folder_ / "gone", std::ios::app) << host << "\n"; }
  Ended start(const std::vector<std::string>& flags, const std::vector<std::string>& program) const {
    std::vector<std::string> words = {"run"};
    words.insert(words.end(), flags.begin(), flags.end());
    words.insert(words.end(), {"--", kRank});
    words.insert(words.end(), program.begin(), program.end());
    // Daemons on one machine must not share Open MPI's names of shared memory.
    return lockstep_run(words, {{"OMPI_MCA_plm_rsh_agent", agent()}, {"OMPI_MCA_btl", "self,tcp"}});
  }
  std::string size() const {
    std::string size;
    std::ifstream(folder_ / "size") >> size;
    return size;
  }
  TempDir folder_;
};

TEST_F(HostsTest, RanksFillHostsInOrderAndTheMapIsShown) {
  const Ended ended = start({"-n", "3", "--hosts", "a:2,b:2,c:2"}, {"choosy", folder_.path(), "0", "1"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("ranks 0-1 on a, 2 on b; spare: c"));
  EXPECT_EQ(size(), "3");
}

TEST_F(HostsTest, ASpareTakesTheLostHostsPlace) {
  lose("a");
  const Ended ended = start({"-n", "4", "--hosts", "a:2,b:2,c:2"}, {"choosy", folder_.path(), "0", "1"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("ranks 0-1 on b, 2-3 on c; not used: a"));
}

TEST_F(HostsTest, WithFewerHostsItRunsInTheLargestWorldThatTheProgramAccepts) {
  lose("b");
  const Ended ended =
      start({"-n", "6", "--min_ranks", "2", "--hosts", "a:3,b:3"}, {"choosy", folder_.path(), "0", "2"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("does not accept 3 ranks"));
  EXPECT_EQ(size(), "2");
}

// Of a host with an older lockstep, or none, nothing is known.
TEST_F(HostsTest, WhatAHostLacksIsToldWhenItIsUsedForTheFirstTime) {
  write_agent(
      "case $host in b) ulimit -n 512;; "
      "c) set -- \"$(printf %s \"$*\" | sed 's,bin/lockstep,bin/no-lockstep,')\";; esac");
  const Ended ended = start({"-n", "3", "--restarts", "1", "--hosts", "a:1,b:1,c:1"},
                            {"recover", folder_.path(), "0", "1", "--run_dir=" + folder_.path()});
  EXPECT_EQ(ended.code, 0) << ended.err;
  const std::string bad = "BAD   b: open files: limit 512\n      mend: ulimit -n 4096\n";
  EXPECT_THAT(ended.err, HasSubstr(bad));
  EXPECT_EQ(ended.err.find("BAD"), ended.err.rfind("BAD")) << ended.err;
  EXPECT_LT(ended.err.find(bad), ended.err.find("ranks 0 on a, 1 on b, 2 on c"));
  EXPECT_THAT(ended.err, HasSubstr("restart 1 of 1"));
}

TEST_F(HostsTest, TheHostOfAFaultyRankIsLeftOut) {
  const Ended ended =
      start({"-n", "4", "--hosts", "a:2,b:2,c:2"}, {"faulty", folder_.path(), "2", "0", "--run_dir=" + folder_.path()});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("ranks 0-1 on a, 2-3 on c; not used: b"));
}

TEST_F(HostsTest, SoItDoesWhereEarlierStartsHaveTrained) {
  lose("b");
  const TempDir run;
  std::ofstream(run / "metrics.jsonl") << "{\"step\":7}\n";
  const Ended ended = start({"-n", "6", "--min_ranks", "2", "--hosts", "a:3,b:3"},
                            {"choosy", folder_.path(), "0", "2", "--run_dir=" + run.path()});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(size(), "2");
}

TEST_F(HostsTest, WithoutMinRanksAMissingHostIsNamedAndWaitedFor) {
  lose("b");
  const Ended ended = start({"--restarts", "1", "--hosts", "a:2,b:2"}, {"choosy", folder_.path(), "0", "1"});
  EXPECT_EQ(ended.code, 77) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("no answer from b: 2 of 4 ranks have a place"));
}

TEST_F(HostsTest, AWorldThatIsRefusedWholeIsItsUsersMistake) {
  const Ended ended = start({"--min_ranks", "1", "--hosts", "a:2,b:1"}, {"choosy", folder_.path(), "0", "2"});
  EXPECT_EQ(ended.code, 78) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("3 ranks are no multiple"));
}

TEST_F(HostsTest, AHostfileAndThisMachineWork) {
  std::ofstream(folder_ / "hostfile") << "# two\na slots=1\nlocalhost slots=1\n";
  const Ended ended = start({"--hostfile", folder_ / "hostfile"}, {"choosy", folder_.path(), "0", "1"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(size(), "2");
}

}  // namespace
}  // namespace lockstep
