#include <atomic>
#include <csignal>
#include <fstream>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/format/fencing.h>

#include "../temp_dir.h"

namespace lockstep::format {
namespace {

using namespace std::chrono_literals;
using testing::HasSubstr;

// A child process that owns the run's next epoch until it is told to go.
class OtherStart {
 public:
  explicit OtherStart(const std::string& run_dir) {
    std::array<int, 2> ready{};
    if (pipe(ready.data()) != 0) throw std::runtime_error("pipe");
    pid_ = fork();
    if (pid_ == 0) {
      char ok = 'y';
      try {
        create_epoch(real_fs(), run_dir, {});
      } catch (const Error&) {
        ok = 'n';
      }
      if (write(ready[1], &ok, 1) != 1) _exit(1);
      pause();
      _exit(0);
    }
    char ok = 0;
    acquired_ = read(ready[0], &ok, 1) == 1 && ok == 'y';
    close(ready[0]);
    close(ready[1]);
  }
  OtherStart(const OtherStart&) = delete;
  OtherStart& operator=(const OtherStart&) = delete;
  ~OtherStart() {
    kill();
    reap();
  }
  bool acquired() const { return acquired_; }
  void kill() const { ::kill(pid_, SIGKILL); }
  void reap() {
    if (pid_ > 0) waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  bool acquired_ = false;
};

void write_owner(const std::string& run_dir, uint64_t epoch, const std::string& json) {
  make_directories(real_fs(), run_dir + "/epoch");
  std::ofstream(run_dir + "/epoch/" + std::to_string(epoch)) << json;
}

TEST(FencingTest, EpochsCountUpFromOneInARunThatIsMade) {
  const TempDir directory;
  const std::string run = directory.path() + "/new/run";
  EXPECT_EQ(newest_epoch(real_fs(), run), 0U);
  EXPECT_EQ(create_epoch(real_fs(), run, {}), 1U);
  EXPECT_EQ(create_epoch(real_fs(), run, {}), 2U) << "the same process may start over";
  EXPECT_EQ(newest_epoch(real_fs(), run), 2U);
}

TEST(FencingTest, ALiveOwnerOnThisHostMakesASecondStartRefuse) {
  const TempDir directory;
  const OtherStart other(directory.path());
  ASSERT_TRUE(other.acquired());
  try {
    create_epoch(real_fs(), directory.path(), {});
    FAIL() << "a live owner was overlooked";
  } catch (const Fenced& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::kFenced);
    EXPECT_THAT(error.what(), HasSubstr("--take_over"));
  }
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {.take_over = true}), 2U);
}

TEST(FencingTest, AKilledOwnerIsSucceededAtOnceReapedOrNot) {
  const TempDir directory;
  OtherStart other(directory.path());
  ASSERT_TRUE(other.acquired());
  other.kill();
  std::this_thread::sleep_for(50ms);  // now a zombie: its entry in /proc is still there
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {}), 2U);
  EXPECT_LT(std::chrono::steady_clock::now() - start, 1s) << "nobody had to be watched";
}

TEST(FencingTest, AReusedProcessNumberIsNotTheOwner) {
  const TempDir directory;
  std::string boot_id;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), boot_id);
  std::array<char, 256> host{};
  gethostname(host.data(), host.size());
  write_owner(directory.path(), 1,
              R"({"host":")" + std::string(host.data()) + R"(","boot_id":")" + boot_id +
                  R"(","pid":1,"start_time":"123456789123"})");
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {.watch = 60s}), 2U);
}

TEST(FencingTest, AnOwnerOnAnotherHostLivesAsLongAsItsHeartbeatMoves) {
  const TempDir directory;
  write_owner(directory.path(), 1, R"({"host":"elsewhere","boot_id":"x","pid":1,"start_time":"1","job_id":"77"})");
  std::atomic<bool> stop{false};
  {
    const std::jthread heart([&] {
      for (uint64_t count = 0; !stop; ++count, std::this_thread::sleep_for(20ms))
        beat(real_fs(), directory.path(), 1, count);
    });
    EXPECT_THROW(create_epoch(real_fs(), directory.path(), {.watch = 2000ms}), Fenced);
    EXPECT_THROW(create_epoch(real_fs(), directory.path(), {.job_id = "78", .watch = 2000ms}), Fenced);
    EXPECT_EQ(newest_epoch(real_fs(), directory.path()), 1U);
    stop = true;
  }
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {.watch = 200ms}), 2U) << "its heart stands still";
}

TEST(FencingTest, OurOwnJobRequeuedElsewhereNeedNotBeWatched) {
  const TempDir directory;
  write_owner(directory.path(), 1, R"({"host":"elsewhere","boot_id":"x","pid":1,"start_time":"1","job_id":"77"})");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {.job_id = "77", .watch = 60s}), 2U);
  EXPECT_LT(std::chrono::steady_clock::now() - start, 1s);
}

TEST(FencingTest, AnEarlierStartOfOurJobThatComesLateDoesNotSupersedeALaterOne) {
  const TempDir directory;
  write_owner(directory.path(), 1,
              R"({"host":"elsewhere","boot_id":"x","pid":1,"start_time":"1","job_id":"77","job_start":3})");
  EXPECT_THROW(create_epoch(real_fs(), directory.path(), {.job_id = "77", .job_start = 2, .watch = 60s}), Fenced);
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {.job_id = "77", .job_start = 4, .watch = 60s}), 2U);
}

// Its operation was under way when its job was started anew, and won the race for an epoch.
TEST(FencingTest, ARaceLostToAnEarlierStartOfOurJobIsRunAgain) {
  for (const int64_t rival : {1, 2, 3}) {
    const TempDir directory;
    bool is_won = false;
    FaultFs slow(real_fs(), [&](const std::string& operation, const std::string&, int64_t) {
      if (operation != "rename" || is_won) return Fault{};
      is_won = true;
      write_owner(
          directory.path(), 1,
          R"({"host":"elsewhere","boot_id":"x","pid":1,"job_id":"77","job_start":)" + std::to_string(rival) + "}");
      return Fault{};
    });
    const Starter ours{.job_id = "77", .job_start = 2, .watch = 60s};
    if (rival < 2) {
      EXPECT_EQ(create_epoch(slow, directory.path(), ours), 2U);
    } else {
      EXPECT_THROW(create_epoch(slow, directory.path(), ours), Fenced) << rival;
    }
    EXPECT_TRUE(is_won);
  }
}

TEST(FencingTest, AnOwnerThatSignedOffNeedNotBeWatched) {
  const TempDir directory;
  write_owner(directory.path(), 1, R"({"host":"elsewhere","boot_id":"x","pid":1,"start_time":"1"})");
  release_epoch(real_fs(), directory.path(), 1);
  release_epoch(real_fs(), directory.path(), 1);
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {.watch = 60s}), 2U);
}

TEST(FencingTest, ATornOwnerFileIsNobodys) {
  const TempDir directory;
  write_owner(directory.path(), 4, "{\"host\":");
  write_owner(directory.path(), 5, "");
  EXPECT_EQ(create_epoch(real_fs(), directory.path(), {.watch = 60s}), 6U);
}

TEST(FencingTest, OfProcessesThatRaceNoTwoGetOneEpoch) {
  const TempDir directory;
  constexpr int kRivals = 4;
  for (int round = 0; round < 25; ++round) {
    const uint64_t before = newest_epoch(real_fs(), directory.path());
    std::array<pid_t, kRivals> rivals{};
    for (pid_t& rival : rivals) {
      rival = fork();
      if (rival != 0) continue;
      try {
        create_epoch(real_fs(), directory.path(), {});
      } catch (const Fenced&) {
        _exit(2);
      } catch (...) {
        _exit(3);
      }
      _exit(1);
    }
    uint64_t won = 0;
    for (const pid_t rival : rivals) {
      int status = 0;
      waitpid(rival, &status, 0);
      EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) != 3) << status;
      won += WIFEXITED(status) && WEXITSTATUS(status) == 1 ? 1 : 0;
    }
    EXPECT_GE(won, 1U);
    EXPECT_EQ(newest_epoch(real_fs(), directory.path()) - before, won) << "two starts share an epoch";
  }
}

TEST(FencingTest, WhateverCallFailsNoEpochIsHalfMade) {
  for (int64_t k = 0;; ++k) {
    const TempDir directory;
    bool triggered = false;
    FaultFs faulty(real_fs(), [&](const std::string&, const std::string&, int64_t call) {
      if (call != k) return Fault{};
      triggered = true;
      return Fault{.error_number = EIO};
    });
    try {
      create_epoch(faulty, directory.path() + "/run", {});
    } catch (const IoError& error) {
      EXPECT_EQ(error.error_number(), EIO);
      EXPECT_THAT(error.what(), HasSubstr(directory.path()));
    }
    EXPECT_NO_THROW(create_epoch(real_fs(), directory.path() + "/run", {})) << "call " << k;
    if (!triggered) break;
    ASSERT_LT(k, 100);
  }
}

}  // namespace
}  // namespace lockstep::format
