#include "plan.h"

#include <gtest/gtest.h>

#include "state.h"

namespace lockstep::checkpoint {
namespace {

class PlanTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, PlanTest, testing::Values(1, 2, 3, 4, 7, 8, 64));

TEST_P(PlanTest, EveryRankDerivesTheSamePlanAndEachDistinctBoxIsWrittenOnceByAHolder) {
  for (const Cut cut : kAllCuts) {
    const auto plan = plan_boxes(make_state(cut, GetParam(), 0, 0), GetParam());
    for (int rank = 1; rank < GetParam(); ++rank)
      EXPECT_EQ(plan_boxes(make_state(cut, GetParam(), rank, 0), GetParam()), plan);
    const auto state = make_state(cut, GetParam(), 0, 0);
    std::vector<int64_t> elements(state.size(), 0);
    for (const PlannedBox& planned : plan) {
      EXPECT_EQ(state[planned.tensor].layout.boxes[planned.owner], planned.box);
      elements[planned.tensor] += planned.box.numel();
    }
    for (size_t i = 0; i < state.size(); ++i) EXPECT_EQ(elements[i], Box::whole(state[i].layout.shape).numel());
  }
}

TEST_P(PlanTest, ReplicasShareTheWritingWithinTheLargestTensor) {
  std::vector<StateTensor> state;
  int64_t largest = 0, total = 0;
  for (int i = 1; i <= 100; ++i) {
    const int64_t numel = 1 + (i * 7919) % 1000;
    state.push_back({"weights", ShardLayout::replicated("w" + std::to_string(i), {numel}, "F32", GetParam()), {}});
    largest = std::max(largest, 4 * numel);
    total += 4 * numel;
  }
  std::vector<int64_t> load(GetParam(), 0);
  for (const PlannedBox& planned : plan_boxes(state, GetParam())) load[planned.owner] += 4 * planned.box.numel();
  EXPECT_LE(*std::max_element(load.begin(), load.end()), total / GetParam() + largest);
  if (GetParam() <= 8) {
    EXPECT_LE(*std::max_element(load.begin(), load.end()), total / GetParam() * 101 / 100);
  }
}

TEST(PlanOrderTest, BoxesOfOneHolderCountBeforeReplicasAreSpread) {
  // Rank 0 alone holds a large tensor; the small replica that comes first must go to rank 1 all the same.
  ShardLayout only = ShardLayout::replicated("only", {100}, "F32", 2);
  only.boxes[1].sizes = {0};
  const std::vector<StateTensor> state = {{"weights", ShardLayout::replicated("small", {10}, "F32", 2), {}},
                                          {"weights", only, {}}};
  const auto plan = plan_boxes(state, 2);
  ASSERT_EQ(plan.size(), 2U);
  EXPECT_EQ(plan[0].owner, 1);
  EXPECT_EQ(plan[1].owner, 0);
}

}  // namespace
}  // namespace lockstep::checkpoint
