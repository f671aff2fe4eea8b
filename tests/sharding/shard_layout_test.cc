#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/shard_layout.h>

namespace lockstep {
namespace {

class ShardLayoutTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, ShardLayoutTest, testing::Values(1, 2, 3, 4, 7, 8));

TEST_P(ShardLayoutTest, AReplicaOnEveryRankIsTheWholeTensor) {
  const ShardLayout layout = ShardLayout::replicated("w", {5, 3}, "F32", GetParam());
  ASSERT_EQ(layout.boxes.size(), static_cast<size_t>(GetParam()));
  for (const Box& box : layout.boxes) EXPECT_EQ(box, Box::whole({5, 3}));
  EXPECT_NO_THROW(layout.check());
}

TEST_P(ShardLayoutTest, ACutAlongADimFillsTheTensorInSizesThatDifferByAtMostOne) {
  const std::vector<int64_t> shape = {13, 5, 1};
  for (int dim = 0; dim < 3; ++dim) {
    const ShardLayout layout = ShardLayout::sharded("w", shape, "F32", dim, GetParam());
    EXPECT_NO_THROW(layout.check());
    int64_t next = 0;
    for (const Box& box : layout.boxes) {
      EXPECT_EQ(box.offsets[dim], next);
      next += box.sizes[dim];
      EXPECT_GE(box.sizes[dim], shape[dim] / GetParam());
      EXPECT_LE(box.sizes[dim], shape[dim] / GetParam() + 1);
    }
    EXPECT_EQ(next, shape[dim]);
  }
}

TEST_P(ShardLayoutTest, AnEmptyTensorIsALayoutToo) {
  EXPECT_NO_THROW(ShardLayout::sharded("w", {0, 3}, "F32", 0, GetParam()).check());
  EXPECT_NO_THROW(ShardLayout::sharded("w", {0, 3}, "F32", 1, GetParam()).check());
}

TEST(ShardLayoutCheckTest, GapsOverlapsAndBoxesOutsideAreNamed) {
  ShardLayout layout = ShardLayout::sharded("blocks.0.weight", {4, 4}, "F32", 0, 2);
  layout.boxes[1].offsets[0] = 1;
  try {
    layout.check();
    FAIL();
  } catch (const CheckFailed& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("blocks.0.weight"));
  }
  layout.boxes[1] = {{3, 0}, {1, 4}};
  EXPECT_THROW(layout.check(), CheckFailed);
  layout.boxes[1] = {{3, 0}, {2, 4}};
  EXPECT_THROW(layout.check(), CheckFailed);
}

TEST(ShardLayoutCheckTest, ADimThatIsNotThereCannotBeCut) {
  EXPECT_THROW(ShardLayout::sharded("w", {4}, "F32", 1, 2), CheckFailed);
  EXPECT_THROW(ShardLayout::sharded("w", {}, "F32", 0, 2), CheckFailed);
}

}  // namespace
}  // namespace lockstep
