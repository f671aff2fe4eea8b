// A save in the background: the caller goes on, and what lands is what was there when it began.
#include <atomic>
#include <chrono>
#include <filesystem>
#include <thread>

#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/fencing.h>
#include <lockstep/format/manifest.h>

#include "staging.h"
#include "state.h"
#include "temp_dir.h"

namespace lockstep::checkpoint {
namespace {

using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;

void expect_newest(const std::string& run_dir, int64_t step, int salt) {
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir, .epoch = 9});
    const auto state = make_state(Cut::kRows, 2, group.rank(), 0, /*filled=*/false);
    const auto progress = store.load_newest(state);
    ASSERT_TRUE(progress.has_value());
    EXPECT_EQ(progress->step, step);
    EXPECT_EQ(first_difference(state, group.rank(), salt), "");
  });
}

void overwrite(const std::vector<StateTensor>& state) {
  for (const StateTensor& tensor : state) tensor.local.fill_(1);
}

SaveResult finish(Store& store) {
  std::optional<SaveResult> result;
  while (!result) result = store.advance_save();
  return *result;
}

// Holds storage up, from the moment it is asked to make room for a shard until open() is called.
class Gate {
 public:
  FaultFs::Decide decide() {
    return [this](const std::string& kind, const std::string&, int64_t) {
      while (kind == "allocate" && !is_open_ && std::chrono::steady_clock::now() < deadline_)
        std::this_thread::sleep_for(1ms);
      return Fault{};
    };
  }
  void open() { is_open_ = true; }

 private:
  std::atomic<bool> is_open_ = false;
  std::chrono::steady_clock::time_point deadline_ = std::chrono::steady_clock::now() + 20s;
};

class AsynchronousSaveTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, AsynchronousSaveTest, testing::Values(1, 2, 3, 4));

TEST_P(AsynchronousSaveTest, WhatLandsIsWhatWasThereWhenItBegan) {
  for (const Cut cut : kAllCuts) {
    const TempDir run;
    Gate gate;
    FaultFs fs(real_fs(), gate.decide());
    run_local_ranks(GetParam(), [&](ProcessGroup& group) {
      Store store(fs, group, {.run_dir = run.path()});
      for (int salt = 1; salt <= 3; ++salt) {  // the memory of the copy is used again
        const auto state = make_state(cut, GetParam(), group.rank(), salt);
        if (salt == 1) store.reserve(state);
        ASSERT_TRUE(store.start_save(progress_at(salt), state));
        EXPECT_TRUE(store.is_saving());
        EXPECT_TRUE(store.is_writing() || salt > 1 || group.rank() > 0) << "it waits at the gate";
        overwrite(state);
        group.barrier();
        gate.open();
        const SaveResult result = finish(store);
        EXPECT_TRUE(result.durable);
        EXPECT_EQ(result.step, salt);
        EXPECT_GT(result.stall_seconds, 0);
        EXPECT_LE(result.stall_seconds, result.seconds);
        EXPECT_GT(result.storage_seconds, 0);
        EXPECT_LE(result.storage_seconds, result.seconds);
        EXPECT_FALSE(store.is_saving());
      }
    });
    expect_newest(run.path(), 3, 3);
  }
}

TEST(AsynchronousSaveOnceTest, NothingIsDurableBeforeEveryRankHasWrittenAndOneSaveGoesAtATime) {
  const TempDir run;
  Gate gate;
  FaultFs fs(real_fs(), gate.decide());
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store store(group.rank() == 1 ? static_cast<Fs&>(fs) : real_fs(), group, {.run_dir = run.path()});
    const auto state = make_state(Cut::kRows, 2, group.rank(), 1);
    ASSERT_TRUE(store.start_save(progress_at(1), state));
    EXPECT_THROW(store.start_save(progress_at(2), state), CheckFailed);
    EXPECT_THROW(store.save(progress_at(2), state), CheckFailed);
    if (group.rank() == 0) {
      while (store.is_writing()) std::this_thread::sleep_for(1ms);
      std::this_thread::sleep_for(50ms);
      EXPECT_FALSE(std::filesystem::exists(run.path() + "/checkpoints/step-00000001.e0001/MANIFEST"));
      gate.open();
    }
    EXPECT_EQ(store.advance_save(), std::nullopt) << "the manifest comes next";
    EXPECT_TRUE(store.advance_save()->durable);
  });
  expect_newest(run.path(), 1, 1);
}

// A start that dies leaves a folder without a manifest, which the next one removes.
TEST(AsynchronousSaveOnceTest, OneThatIsLeftInTheMiddleIsNoCheckpoint) {
  const TempDir run;
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    EXPECT_TRUE(store.save(progress_at(1), make_state(Cut::kRows, 2, group.rank(), 1)));
    ASSERT_TRUE(store.start_save(progress_at(2), make_state(Cut::kRows, 2, group.rank(), 2)));
  });
  EXPECT_TRUE(std::filesystem::exists(run.path() + "/checkpoints/step-00000002.e0001"));
  expect_newest(run.path(), 1, 1);
  EXPECT_FALSE(std::filesystem::exists(run.path() + "/checkpoints/step-00000002.e0001"));
}

TEST(AsynchronousSaveOnceTest, ANewerStartEndsItOnEveryRank) {
  const TempDir run;
  std::atomic<int> fenced = 0;
  run_local_ranks(2, [&](ProcessGroup& group) {
    const uint64_t epoch = acquire_epoch(real_fs(), group, run.path(), false);
    Store store(real_fs(), group, {.run_dir = run.path(), .epoch = epoch});
    ASSERT_TRUE(store.start_save(progress_at(1), make_state(Cut::kRows, 2, group.rank(), 1)));
    if (group.rank() == 0) format::create_epoch(real_fs(), run.path(), {.take_over = true});
    try {
      finish(store);
    } catch (const Fenced&) {
      ++fenced;
    }
    EXPECT_FALSE(store.is_saving());
  });
  EXPECT_EQ(fenced, 2);
  EXPECT_TRUE(std::filesystem::is_empty(run.path() + "/checkpoints"));
}

// As faults_test.cc has it for a save that is waited for: the k-th call fails, for every k there is.
TEST_P(AsynchronousSaveTest, AFailureInTheBackgroundCostsThatSaveAlone) {
  const TempDir run;
  int64_t step = 1;
  int failed = 0;
  bool triggered = true;
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path(), .keep_last = 2});
    EXPECT_TRUE(store.save(progress_at(step), make_state(Cut::kRows, GetParam(), group.rank(), 1)));
  });
  for (int64_t k = 0; triggered; ++k) {
    ASSERT_LT(k, 1000);
    triggered = false;
    FaultFs fs(real_fs(), [&](const std::string&, const std::string&, int64_t call) {
      triggered = triggered || call == k;
      return Fault{.error_number = call == k ? EIO : 0};
    });
    std::atomic<int> durable = 0;
    run_local_ranks(GetParam(), [&](ProcessGroup& group) {
      Store store(fs, group, {.run_dir = run.path(), .keep_last = 2});
      const auto state = make_state(Cut::kRows, GetParam(), group.rank(), static_cast<int>(step) + 1);
      const bool began = store.start_save(progress_at(step + 1), state);
      overwrite(state);
      durable += began && finish(store).durable;
    });
    ASSERT_TRUE(durable == 0 || durable == GetParam()) << "call " << k << ": the ranks do not agree";
    const std::string attempted = run.path() + "/checkpoints/" + format::directory_name(step + 1, 1);
    EXPECT_EQ(std::filesystem::exists(attempted), durable > 0) << "call " << k;
    failed += durable == 0;
    step += durable > 0;
    expect_newest(run.path(), step, static_cast<int>(step));
  }
  EXPECT_GT(failed, 8) << "calls of which a save consists";
}

// The save that needs no copy, of a run's end, must not suffer for it.
TEST(StagingTest, ACopyThatFindsNoMemoryEndsTheSaveThatNeedsItAlone) {
  const TempDir run;
  run_local_ranks(1, [&](ProcessGroup& group) {
    constexpr int64_t kRows = int64_t{1} << 57;
    Store store(real_fs(), group, {.run_dir = run.path()});
    ShardLayout layout = ShardLayout::sharded("huge", {kRows}, "F64", 0, 1);
    const std::vector<StateTensor> huge = {{"weights", std::move(layout), at::zeros({1}, at::kDouble).expand({kRows})}};
    store.reserve(huge);
    EXPECT_TRUE(store.save(progress_at(1), make_state(Cut::kRows, 1, 0, 1)));
    EXPECT_THROW(store.start_save(progress_at(2), huge), ConfigError);
  });
}

TEST(StagingTest, MemoryIsKeptAndGrows) {
  Staging staging;
  std::byte* first = staging.reserve(1 << 20).data();
  EXPECT_EQ(staging.reserve(1 << 10).data(), first);
  EXPECT_EQ(staging.reserve(1 << 20).size(), size_t{1} << 20);
  const auto more = staging.reserve(3 << 20);
  std::fill(more.begin(), more.end(), std::byte{7});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(more.data()) % 64, 0);
  EXPECT_TRUE(staging.reserve(0).empty());
  EXPECT_THROW(staging.reserve(size_t{1} << 60), ConfigError);
}

}  // namespace
}  // namespace lockstep::checkpoint
