// Storage that fails: every call in turn, and random damage on disk.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/base/log.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>

#include "../support/log_catcher.h"
#include "format/written_checkpoint.h"
#include "state.h"
#include "temp_dir.h"

namespace lockstep::checkpoint {
namespace {

using testing::HasSubstr;

struct FaultCase {
  int world_size;
  int error_number;
  int64_t short_bytes;
};

std::ostream& operator<<(std::ostream& out, const FaultCase& fault) {
  return out << fault.world_size << " ranks, errno " << fault.error_number << ", short " << fault.short_bytes;
}

class EveryCallTest : public testing::TestWithParam<FaultCase> {};
INSTANTIATE_TEST_SUITE_P(Faults, EveryCallTest,
                         testing::Values(FaultCase{1, ENOSPC, -1}, FaultCase{1, EIO, -1}, FaultCase{1, EMFILE, -1},
                                         FaultCase{1, EDQUOT, -1}, FaultCase{1, EINTR, -1}, FaultCase{1, ESTALE, -1},
                                         FaultCase{1, EROFS, -1}, FaultCase{1, ENOMEM, -1}, FaultCase{1, ENOSPC, 100},
                                         FaultCase{2, ENOSPC, -1}, FaultCase{2, EIO, -1}, FaultCase{2, EMFILE, -1},
                                         FaultCase{2, EDQUOT, -1}, FaultCase{2, ESTALE, -1}, FaultCase{2, EROFS, 7}));

// The loop of SQLite's tests: the k-th call fails, for k = 0, 1, ... until a save has no k-th call.
TEST_P(EveryCallTest, AFailedSaveHarmsNothingSaysWhyLeavesNothingAndTheNextOneWorks) {
  const int world_size = GetParam().world_size, error_number = GetParam().error_number;
  const int64_t short_bytes = GetParam().short_bytes;
  google::SetStderrLogging(google::FATAL);
  const TempDir run;
  const auto save = [&](Fs& fs, int64_t step, int salt) {
    bool saved = false;
    run_local_ranks(world_size, [&](ProcessGroup& group) {
      Store store(fs, group, {.run_dir = run.path(), .keep_last = 2});
      const bool mine = store.save(progress_at(step), make_state(Cut::kRows, world_size, group.rank(), salt));
      if (group.rank() == 0) saved = mine;
    });
    return saved;
  };
  const auto expect_newest = [&](int64_t step, int salt) {
    run_local_ranks(1, [&](ProcessGroup& group) {
      Store store(real_fs(), group, {.run_dir = run.path(), .epoch = 1});
      const auto state = make_state(Cut::kReplicated, 1, 0, 0, /*filled=*/false);
      EXPECT_EQ(store.load_newest(state)->step, step);
      EXPECT_EQ(first_difference(state, 0, salt), "");
    });
  };
  ASSERT_TRUE(save(real_fs(), 1, 1));
  ASSERT_TRUE(save(real_fs(), 2, 2));
  int64_t step = 2;
  bool triggered = true;
  int failed_saves = 0;
  for (int64_t k = 0; triggered; ++k) {
    ASSERT_LT(k, 1000);
    triggered = false;
    std::string victim;
    const test::LogCatcher log(google::GLOG_ERROR);
    FaultFs faulty(real_fs(), [&](const std::string& kind, const std::string& path, int64_t call) {
      if (call != k) return Fault{};
      triggered = true;
      victim = path;
      return Fault{.error_number = error_number, .short_bytes = kind == "write" ? short_bytes : -1};
    });
    const bool saved = save(faulty, step + 1, static_cast<int>(step + 1));
    if (triggered) {
      EXPECT_THAT(log.text(), HasSubstr(victim)) << "call " << k;
      EXPECT_THAT(log.text(), HasSubstr("errno " + std::to_string(error_number))) << "call " << k;
    }
    if (saved) ++step;  // what failed came after the commit: the removal of an old one
    failed_saves += saved ? 0 : 1;
    const std::string attempted = run.path() + "/checkpoints/" + format::directory_name(step + (saved ? 0 : 1), 1);
    EXPECT_EQ(std::filesystem::exists(attempted), saved) << "call " << k << " on " << victim;
    expect_newest(step, static_cast<int>(step));
  }
  EXPECT_GE(failed_saves, 10) << "the fault was hardly ever met";
  EXPECT_TRUE(save(real_fs(), step + 1, 9));
  expect_newest(step + 1, 9);
  EXPECT_EQ(format::list_candidates(real_fs(), run.path() + "/checkpoints").size(), 2U) << "leftovers";
  google::SetStderrLogging(google::ERROR);
}

// A load that meets an error either still gives the right bytes, of this checkpoint or the one before, or says so.
TEST_P(EveryCallTest, ALoadThatMeetsAnErrorGivesRightBytesOrNone) {
  const int world_size = GetParam().world_size, error_number = GetParam().error_number;
  google::SetStderrLogging(google::FATAL);
  const TempDir run;
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    for (int step : {1, 2}) store.save(progress_at(step), make_state(Cut::kRows, group.size(), group.rank(), step));
  });
  std::set<int64_t> steps_seen;
  bool triggered = true;
  for (int64_t k = 0; triggered; ++k) {
    ASSERT_LT(k, 1000);
    triggered = false;
    FaultFs faulty(real_fs(), [&](const std::string&, const std::string&, int64_t call) {
      if (call != k) return Fault{};
      triggered = true;
      return Fault{.error_number = error_number};
    });
    run_local_ranks(world_size, [&](ProcessGroup& group) {
      Store store(faulty, group, {.run_dir = run.path()});
      const auto state = make_state(Cut::kRows, group.size(), group.rank(), 0, /*filled=*/false);
      try {
        const auto progress = store.load_newest(state);
        ASSERT_TRUE(progress.has_value());
        EXPECT_EQ(first_difference(state, group.rank(), static_cast<int>(progress->step)), "");
        if (group.rank() == 0) steps_seen.insert(progress->step);
        if (error_number == EMFILE) {
          EXPECT_EQ(progress->step, 2) << "a full table must not cost steps";
        }
      } catch (const Error& error) {
        EXPECT_EQ(error.exit_code(), ExitCode::kStorage) << error.what();
        EXPECT_THAT(error.what(), HasSubstr("errno " + std::to_string(error_number)));
      }
    });
    EXPECT_FALSE(std::filesystem::exists(run.path() + "/checkpoints/step-00000002.e0001/QUARANTINED"))
        << "an error of the storage is no proof of damage";
  }
  EXPECT_TRUE(steps_seen.contains(2));
  google::SetStderrLogging(google::ERROR);
}

// Names that a load does not see yet, as on NFS.
class LateNamesTest : public testing::Test {
 protected:
  static constexpr int kWorldSize = 2;
  void SetUp() override {
    run_local_ranks(kWorldSize, [&](ProcessGroup& group) {
      Store store(real_fs(), group, {.run_dir = run_.path()});
      for (int step : {1, 2}) store.save(progress_at(step), make_state(Cut::kRows, group.size(), group.rank(), step));
    });
  }
  int64_t load(Fs& fs, Milliseconds timeout) {
    std::atomic<int64_t> step{-1};
    run_local_ranks(kWorldSize, [&](ProcessGroup& group) {
      Store store(fs, group, {.run_dir = run_.path(), .timeout = timeout, .known_durable = {{1, 1}, {1, 2}}});
      const auto state = make_state(Cut::kRows, group.size(), group.rank(), 0, /*filled=*/false);
      step = store.load_newest(state)->step;
      EXPECT_EQ(first_difference(state, group.rank(), static_cast<int>(step)), "");
    });
    return step;
  }
  bool is_quarantined() const { return std::filesystem::exists(newer_ + "/QUARANTINED"); }

  TempDir run_;
  std::string newer_ = run_.path() + "/checkpoints/step-00000002.e0001";
  FaultFs late_{real_fs(), [](const std::string&, const std::string&, int64_t) { return Fault{}; }};
};

TEST_F(LateNamesTest, AreWaitedForAndTheNewestIsLoaded) {
  for (const std::string& name : {std::string(format::kManifestName), format::shard_name(1, kWorldSize)}) {
    const test::LogCatcher warnings(google::GLOG_WARNING);
    late_.show_late(newer_ + "/" + name, 6);
    EXPECT_EQ(load(late_, std::chrono::minutes(2)), 2) << name;
    EXPECT_FALSE(is_quarantined()) << name;
    EXPECT_THAT(warnings.text(), testing::AllOf(HasSubstr(name), HasSubstr("for up to 60 s")));
    const std::string text = warnings.text();
    EXPECT_LE(std::count(text.begin(), text.end(), '\n'), kWorldSize) << "said more than once: " << text;
  }
}

TEST_F(LateNamesTest, AreDamageWhenTheyNeverComeBeforeTheOtherRanksGiveUp) {
  google::SetStderrLogging(google::FATAL);
  late_.show_late(newer_ + "/" + format::shard_name(1, kWorldSize), 1 << 30);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(load(late_, std::chrono::seconds(4)), 1);
  const auto waited = std::chrono::steady_clock::now() - start;
  EXPECT_GT(waited, std::chrono::milliseconds(500)) << "did not wait";
  EXPECT_LT(waited, std::chrono::seconds(30)) << "waited for longer than the other ranks do";
  EXPECT_TRUE(is_quarantined());
  google::SetStderrLogging(google::ERROR);
}

TEST_F(LateNamesTest, AreDamageAtOnceWhereNamesDoNotShowLate) {
  google::SetStderrLogging(google::FATAL);
  if (real_fs().shows_late(run_.path())) GTEST_SKIP() << "the folder for temporary files is on a network file system";
  std::filesystem::remove(newer_ + "/" + format::shard_name(1, kWorldSize));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(load(real_fs(), std::chrono::minutes(2)), 1);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30)) << "waited";
  EXPECT_TRUE(is_quarantined());
  google::SetStderrLogging(google::ERROR);
}

TEST(DamageTest, OfTenThousandDamagedCheckpointsNoneIsLoadedAndTheOneBeforeIs) {
  google::SetStderrLogging(google::FATAL);
  constexpr int kWorldSize = 3;
  const int rounds = std::getenv("LOCKSTEP_DEEP") ? 1'000'000 : 10'000;
  const TempDir run;
  run_local_ranks(kWorldSize, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    for (int step : {1, 2}) store.save(progress_at(step), make_state(Cut::kRows, kWorldSize, group.rank(), step));
  });
  const std::string older = run.path() + "/checkpoints/step-00000001.e0001",
                    newer = run.path() + "/checkpoints/step-00000002.e0001";
  std::map<std::filesystem::path, std::string> good;  // by file
  for (const auto& file : std::filesystem::directory_iterator(newer))
    good[file.path()] = read_text(real_fs(), file.path(), 1 << 20);
  std::mt19937 random(23);
  int damaged = 0;
  run_local_ranks(1, [&](ProcessGroup& group) {
    const auto state = make_state(Cut::kColumns, 1, 0, 0, /*filled=*/false);
    for (int round = 0; round < rounds; ++round) {
      const std::string how = format::damage(newer, older, random);
      Store store(
          real_fs(), group,
          {.run_dir = run.path(), .epoch = 2, .late_names = Milliseconds(0), .known_durable = {{1, 1}, {1, 2}}});
      damaged += how.empty() ? 0 : 1;
      ASSERT_EQ(store.load_newest(state)->step, how.empty() ? 2 : 1) << "round " << round << ": " << how;
      ASSERT_EQ(first_difference(state, 0, how.empty() ? 2 : 1), "") << how;
      std::filesystem::remove(newer + "/QUARANTINED");
      for (const auto& [file, text] : good) std::ofstream(file, std::ios::binary) << text;
    }
  });
  EXPECT_GT(damaged, rounds * 9 / 10);
  std::printf("%d damaged checkpoints: none loaded, the one before was\n", damaged);
  google::SetStderrLogging(google::ERROR);
}

}  // namespace
}  // namespace lockstep::checkpoint
