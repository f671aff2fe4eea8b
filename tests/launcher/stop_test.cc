// Requests to stop, and launchers that are killed: what is asked reaches every rank once, and nothing is left behind.
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../runtime/base/temp_dir.h"
#include "lockstep_process.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

std::vector<std::string> job(int ranks, const std::string& deed, const TempDir& folder, int grace_s = 30) {
  return {"run", "-n", std::to_string(ranks), "--restarts", "0", "--grace_s", std::to_string(grace_s), "--",
          kRank, deed, folder.path()};
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class StopTest : public testing::TestWithParam<int> {};  // the signal

TEST_P(StopTest, EveryRankIsAskedOnceWithUsr1) {
  for (const int ranks : {1, 3}) {
    const TempDir folder;
    LockstepProcess process(job(ranks, "count", folder));
    ASSERT_TRUE(wait_for_ranks(folder.path(), ranks)) << process.err();
    process.send(GetParam());
    EXPECT_EQ(process.wait(), 0) << process.err();
    for (int rank = 0; rank < ranks; ++rank) {
      int times = 0;
      std::ifstream(folder / "usr1." + std::to_string(rank)) >> times;
      EXPECT_EQ(times, 1) << "rank " << rank << " of " << ranks;
    }
  }
}

// Before a rank has its handler, USR1 would end it and the job.
TEST(Stop, RanksThatAreNotUpYetAreAskedWhenTheyAre) {
  for (const int ranks : {1, 3}) {
    const TempDir folder;
    auto words = job(ranks, "late", folder);
    words.insert(words.end(), {"0", "1500"});
    LockstepProcess process(words);
    ASSERT_TRUE(wait_for_ranks(folder.path(), ranks)) << process.err();
    process.send(SIGTERM);
    EXPECT_EQ(process.wait(), 0) << process.err();
    int times = 0;
    std::ifstream(folder / "usr1.0") >> times;
    EXPECT_EQ(times, 1);
  }
}

TEST(Stop, AProgramThatNeverSaysItIsReadyIsAskedWhenSomebodyAsksAgain) {
  const TempDir folder;
  LockstepProcess process(job(2, "mute", folder));
  ASSERT_TRUE(wait_for_ranks(folder.path(), 2)) << process.err();
  const auto start = std::chrono::steady_clock::now();
  process.send(SIGUSR1);
  usleep(300'000);
  EXPECT_EQ(process.err().find("asked"), std::string::npos) << "it may not have its handlers yet";
  process.send(SIGUSR1);
  EXPECT_EQ(process.wait(), 0) << process.err();
  EXPECT_LT(seconds_since(start), 8);
}

TEST(Stop, AProgramThatNeverSaysItIsReadyKeepsHalfOfItsGrace) {
  const TempDir folder;
  LockstepProcess process(job(2, "mute", folder, 4));
  ASSERT_TRUE(wait_for_ranks(folder.path(), 2)) << process.err();
  const auto start = std::chrono::steady_clock::now();
  process.send(SIGTERM);
  EXPECT_EQ(process.wait(), 0) << process.err();
  EXPECT_GE(seconds_since(start), 1.9);
}

INSTANTIATE_TEST_SUITE_P(Signals, StopTest, testing::Values(SIGTERM, SIGINT, SIGHUP, SIGUSR1));

TEST(Stop, RanksThatDoNotStopAreEndedAfterTheGrace) {
  for (const int ranks : {1, 2}) {
    const TempDir folder;
    LockstepProcess process(job(ranks, "stay", folder, 1));
    const auto pids = wait_for_ranks(folder.path(), ranks);
    ASSERT_TRUE(pids) << process.err();
    process.send(SIGTERM);
    EXPECT_EQ(process.wait(), 75) << process.err();
    EXPECT_TRUE(are_gone(*pids, 0));
    EXPECT_EQ(process.err().find("first failure"), std::string::npos) << "they did as they were asked";
  }
}

TEST(Stop, NoRankOutlivesAnMpirunThatIsKilled) {
  const TempDir folder;  // also takes what a killed mpirun cannot remove
  LockstepProcess process(job(3, "stay", folder), {{"TMPDIR", folder.path()}});
  const auto pids = wait_for_ranks(folder.path(), 3);
  ASSERT_TRUE(pids) << process.err();
  const auto segments = mapped_segments(*pids);
  process.kill_child();
  EXPECT_EQ(process.wait(), 75) << process.err();
  EXPECT_TRUE(are_gone(*pids, 0));
  for (const std::string& segment : segments) std::filesystem::remove(segment);
}

TEST(Stop, AFirstInterruptAsksAndASecondEnds) {
  for (const int ranks : {1, 2}) {
    const TempDir folder;
    LockstepProcess process(job(ranks, "stay", folder));
    const auto pids = wait_for_ranks(folder.path(), ranks);
    ASSERT_TRUE(pids) << process.err();
    const auto start = std::chrono::steady_clock::now();
    process.send(SIGINT);
    usleep(300'000);
    process.send(SIGINT);
    EXPECT_EQ(process.wait(), 75) << process.err();
    EXPECT_LT(seconds_since(start), 10) << "of 30 s of grace";
    EXPECT_TRUE(are_gone(*pids, 1));
    EXPECT_THAT(process.err(), HasSubstr("ending the ranks"));
  }
}

TEST(Stop, TermAfterTermLeavesTheRanksTheirGrace) {  // Slurm sends USR1, then TERM
  const TempDir folder;
  LockstepProcess process(job(2, "stay", folder, 3));
  ASSERT_TRUE(wait_for_ranks(folder.path(), 2)) << process.err();
  const auto start = std::chrono::steady_clock::now();
  process.send(SIGUSR1);
  usleep(200'000);
  process.send(SIGTERM);
  EXPECT_EQ(process.wait(), 75);
  EXPECT_GE(seconds_since(start), 2.9);
}

TEST(Stop, AKilledLauncherLeavesNoRankAndNoSharedMemory) {
  for (const int ranks : {1, 2, 4}) {
    const TempDir folder;
    LockstepProcess process(job(ranks, "stay", folder));
    const auto pids = wait_for_ranks(folder.path(), ranks);
    ASSERT_TRUE(pids) << process.err();
    const auto segments = mapped_segments(*pids);
    EXPECT_EQ(segments.empty(), ranks == 1);
    process.send(SIGKILL);
    EXPECT_EQ(process.wait(), 1000 + SIGKILL);
    if (!are_gone(*pids, 5)) {
      ADD_FAILURE() << "a rank of " << ranks << " is still there";
      for (const pid_t pid : *pids) ::kill(pid, SIGKILL);
    }
    for (const std::string& segment : segments) {
      for (int i = 0; i < 30 && std::filesystem::exists(segment); ++i) usleep(100'000);
      EXPECT_FALSE(std::filesystem::exists(segment)) << segment << " of " << ranks << " ranks";
    }
  }
}

}  // namespace
}  // namespace lockstep
