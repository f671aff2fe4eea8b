// Real power losses: ext4 on a loop device is shut down at every call of a row of saves, and mounted again.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ostream>

#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/base/log.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>

#include "../support/loop_disk.h"
#include "state.h"
#include "temp_dir.h"

namespace lockstep::checkpoint {
namespace {

using test::LoopDisk;

constexpr size_t kDiskBytes = size_t{8} << 20;
constexpr int64_t kSteps = 3;  // the last of which retires the first; more by hand (LOCKSTEP_DEEP)

struct Losses {
  int world_size;
  bool in_background = false;
  const char* mount_options = "";
};
std::ostream& operator<<(std::ostream& out, const Losses& losses) {
  return out << losses.world_size << " ranks" << (losses.in_background ? ", in the background " : " ")
             << losses.mount_options;
}

bool save(Store& store, const Progress& progress, const std::vector<StateTensor>& state, bool in_background) {
  if (!in_background) return store.save(progress, state);
  if (!store.start_save(progress, state)) return false;
  std::optional<SaveResult> result;
  while (!result) result = store.advance_save();
  return result->durable;
}

// Saves from `first` on, until one fails. @return the last step that was called durable.
int64_t save_steps(Fs& fs, const std::string& run_dir, const Losses& losses, int64_t first, int64_t last) {
  std::atomic<int64_t> acknowledged{first - 1};
  run_local_ranks(losses.world_size, [&](ProcessGroup& group) {
    Store store(fs, group, {.run_dir = run_dir, .keep_last = 2});
    for (int64_t step = first; step <= last; ++step) {
      const auto state = make_state(Cut::kRows, losses.world_size, group.rank(), static_cast<int>(step));
      if (!save(store, progress_at(step), state, losses.in_background)) return;
      if (group.rank() == 0) acknowledged = step;
    }
  });
  return acknowledged;
}

void expect_loads(const std::string& run_dir, int64_t acknowledged, int64_t call) {
  run_local_ranks(1, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir, .epoch = 2});
    const auto state = make_state(Cut::kReplicated, 1, 0, 0, /*filled=*/false);
    const auto progress = store.load_newest(state);
    ASSERT_TRUE(progress) << "call " << call;
    EXPECT_GE(progress->step, acknowledged) << "call " << call;
    EXPECT_LE(progress->step, acknowledged + 1) << "call " << call;
    EXPECT_EQ(first_difference(state, 0, static_cast<int>(progress->step)), "") << "call " << call;
    for (const auto& candidate : format::list_candidates(real_fs(), run_dir + "/checkpoints"))
      EXPECT_TRUE(candidate.complete && !candidate.quarantined) << candidate.path << ", call " << call;
    EXPECT_TRUE(store.save(progress_at(9), state)) << "the run cannot go on, call " << call;
  });
}

class PowerLossTest : public testing::TestWithParam<Losses> {};
INSTANTIATE_TEST_SUITE_P(Losses, PowerLossTest,
                         testing::Values(Losses{1}, Losses{2}, Losses{4}, Losses{2, true}, Losses{4, true}));
INSTANTIATE_TEST_SUITE_P(Deep, PowerLossTest,
                         testing::ValuesIn(std::getenv("LOCKSTEP_DEEP")
                                               ? std::vector<Losses>{{8, true},
                                                                     {4, true, "data=writeback"},
                                                                     {4, false, "data=writeback"},
                                                                     {4, true, "data=journal"}}
                                               : std::vector<Losses>{}));
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PowerLossTest);

TEST_P(PowerLossTest, TheAcknowledgedStepLoadsWheneverThePowerIsCut) {
  if (const std::string reason = LoopDisk::why_not(); !reason.empty()) GTEST_SKIP() << reason;
  google::SetStderrLogging(google::FATAL);
  const TempDir dir;
  const std::string run_dir = dir.path() + "/run";
  LoopDisk first(kDiskBytes);
  const Losses& losses = GetParam();
  const int64_t last = std::getenv("LOCKSTEP_DEEP") ? 8 : kSteps;
  first.mount(dir.path(), losses.mount_options);
  ASSERT_EQ(save_steps(real_fs(), run_dir, losses, 1, 1), 1);
  first.unmount();
  const std::vector<std::byte> image = first.image();
  int64_t call = 0;
  for (bool is_cut = true; is_cut; ++call) {
    LoopDisk disk(image);
    disk.mount(dir.path(), losses.mount_options);
    is_cut = false;
    FaultFs fs(real_fs(), [&](const std::string&, const std::string&, int64_t number) {
      if (number == call) disk.cut_power(), is_cut = true;
      return Fault{};
    });
    const int64_t acknowledged = save_steps(fs, run_dir, losses, 2, last);
    EXPECT_TRUE(is_cut || acknowledged == last);
    disk.unmount();
    disk.mount(dir.path(), losses.mount_options);
    expect_loads(run_dir, acknowledged, call);
    disk.unmount();
  }
  google::SetStderrLogging(google::ERROR);
  EXPECT_GT(call, 40);
  std::printf("%ld power losses on %d ranks: no acknowledged step lost\n", static_cast<long>(call - 1),
              losses.world_size);
}

}  // namespace
}  // namespace lockstep::checkpoint
