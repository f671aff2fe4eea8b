// Power loss at every call of a sequence of saves, with many outcomes for what was not yet synced.
#include <atomic>

#include <gtest/gtest.h>

#include <lockstep/base/log.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>

#include "crash_fs.h"
#include "state.h"

namespace lockstep::checkpoint {
namespace {

struct Moment {
  std::unique_ptr<CrashFs> fs;
  int64_t acknowledged;  // the last step that save() called durable
};

std::vector<Moment> moments_of_saves(int world_size, int64_t num_saves) {
  CrashFs fs;
  fs.make_directory("/run", 0700);
  fs.sync_directory("/");
  std::vector<Moment> moments;
  std::atomic<int64_t> acknowledged{0};
  fs.watch([&] { moments.push_back({fs.copy(), acknowledged}); });
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    Store store(fs, group, {.run_dir = "/run", .keep_last = 2});
    for (int64_t step = 1; step <= num_saves; ++step) {
      EXPECT_TRUE(
          store.save(progress_at(step), make_state(Cut::kRows, world_size, group.rank(), static_cast<int>(step))));
      if (group.rank() == 0) acknowledged = step;
      group.barrier();
    }
  });
  moments.push_back({fs.copy(), acknowledged});
  return moments;
}

bool has_quarantine(Fs& fs) {
  for (const auto& candidate : format::list_candidates(fs, "/run/checkpoints")) {
    if (candidate.quarantined) return true;
  }
  return false;
}

class CrashTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, CrashTest, testing::Values(1, 2, 4));

TEST_P(CrashTest, WhateverAPowerLossLeavesTheAcknowledgedStepOrALaterOneLoads) {
  google::SetStderrLogging(google::FATAL);
  const std::vector<Moment> moments = moments_of_saves(GetParam(), /*num_saves=*/4);
  std::mt19937 random(29);
  int64_t states = 0;
  run_local_ranks(1, [&](ProcessGroup& group) {
    for (size_t moment = 0; moment < moments.size(); ++moment) {
      for (int outcome = 0; outcome < 24; ++outcome, ++states) {
        const double keep = outcome == 0       ? 0.0
                            : outcome == 1     ? 1.0
                            : outcome % 3 == 0 ? 0.1
                            : outcome % 3 == 1 ? 0.5
                                               : 0.9;
        const auto left = moments[moment].fs->after_power_loss(random, keep);
        Store store(*left, group, {.run_dir = "/run", .epoch = 2});
        const auto state = make_state(Cut::kReplicated, 1, 0, 0, /*filled=*/false);
        const auto progress = store.load_newest(state);
        const int64_t loaded = progress ? progress->step : 0;
        ASSERT_GE(loaded, moments[moment].acknowledged) << "call " << moment << " outcome " << outcome;
        if (progress) {
          ASSERT_EQ(first_difference(state, 0, static_cast<int>(loaded)), "");
        }
        ASSERT_FALSE(has_quarantine(*left)) << "a manifest without its shards, call " << moment;
        ASSERT_TRUE(store.save(progress_at(9), state)) << "the run cannot go on, call " << moment;
      }
    }
  });
  google::SetStderrLogging(google::ERROR);
  std::printf("%zu calls, %ld states after a power loss\n", moments.size(), static_cast<long>(states));
}

}  // namespace
}  // namespace lockstep::checkpoint
