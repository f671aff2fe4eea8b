// Each rank changes its rows; whoever asks for a unit finds it whole, and nothing is waited for that nobody asked for.
#include <thread>

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <lockstep/collectives/local_group.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/late_gather.h>

namespace lockstep {
namespace {

constexpr Milliseconds kTimeout{20'000};

class LateGatherTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, LateGatherTest, testing::Values(1, 2, 3, 4, 7, 8));

// Two parameters in each of three units, some with fewer rows than ranks.
std::vector<LateGather::Parameter> parameters() {
  return {{0, at::full({5, 3}, -1.0)}, {0, at::full({1}, -1.0)},    {1, at::full({16, 2}, -1.0)},
          {1, at::full({2}, -1.0)},    {2, at::full({9, 4}, -1.0)}, {2, at::full({7}, -1.0)}};
}

// Row k of parameter i at step s.
float wanted(size_t i, int64_t row, int64_t step) {
  return static_cast<float>(100 * step + 10 * static_cast<int64_t>(i)) + 0.25F * static_cast<float>(row);
}

void update_own_rows(const std::vector<LateGather::Parameter>& all, const ProcessGroup& group, int step) {
  for (size_t i = 0; i < all.size(); ++i) {
    const RowRange rows = row_range(all[i].tensor.size(0), group.rank(), group.size());
    for (int64_t row = rows.begin; row < rows.begin + rows.count; ++row) all[i].tensor[row].fill_(wanted(i, row, step));
  }
}

bool is_whole(const std::vector<LateGather::Parameter>& all, size_t i, int step) {
  for (int64_t row = 0; row < all[i].tensor.size(0); ++row) {
    if (!all[i].tensor[row].eq(wanted(i, row, step)).all().item<bool>()) return false;
  }
  return true;
}

TEST_P(LateGatherTest, AUnitIsWholeOnceItIsRequired) {
  run_local_ranks(GetParam(), [](ProcessGroup& group) {
    const auto all = parameters();
    LateGather gather(group, all, 3, /*bucket_bytes=*/60, kTimeout);
    EXPECT_GT(gather.num_buckets(), 2);
    for (int step = 1; step <= 3; ++step) {
      update_own_rows(all, group, step);
      gather.start();
      for (size_t unit = 0; unit < 3; ++unit) {
        gather.require(unit);
        for (size_t i = 0; i < all.size(); ++i) {
          if (all[i].unit <= unit) {
            EXPECT_TRUE(is_whole(all, i, step)) << "parameter " << i << " after unit " << unit;
          }
        }
        if (unit == 0 && group.size() > 1) {
          EXPECT_FALSE(is_whole(all, 4, step)) << "nobody asked for it yet";
        }
      }
      gather.finish();
    }
  });
}

TEST_P(LateGatherTest, FinishMakesEverythingWholeInAnyCut) {
  for (const int64_t bucket_bytes : {1, 100, 1 << 20}) {
    run_local_ranks(GetParam(), [&](ProcessGroup& group) {
      const auto all = parameters();
      LateGather gather(group, all, 3, bucket_bytes, kTimeout);
      gather.finish();  // nothing was started: nothing to wait for
      update_own_rows(all, group, 1);
      gather.start();
      gather.finish();
      for (size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(is_whole(all, i, 1)) << i;
    });
  }
}

TEST_P(LateGatherTest, LanesMayRequireUnitsAtOnce) {
  run_local_ranks(GetParam(), [](ProcessGroup& group) {
    const auto all = parameters();
    LateGather gather(group, all, 3, /*bucket_bytes=*/1, kTimeout);
    for (int step = 1; step <= 20; ++step) {
      update_own_rows(all, group, step);
      gather.start();
      std::vector<std::jthread> lanes;
      for (size_t lane = 0; lane < 3; ++lane) {
        lanes.emplace_back([&, lane] {
          gather.require(lane);
          EXPECT_TRUE(is_whole(all, 2 * lane, step));
          EXPECT_TRUE(is_whole(all, 2 * lane + 1, step));
        });
      }
      lanes.clear();
    }
  });
}

}  // namespace
}  // namespace lockstep
