#include <numeric>
#include <random>

#include <gtest/gtest.h>

#include <lockstep/format/box.h>

namespace lockstep {
namespace {

// Cuts a box in two at a random place again and again.
std::vector<Box> random_tiling(const std::vector<int64_t>& shape, int cuts, std::mt19937& random) {
  std::vector<Box> boxes = {Box::whole(shape)};
  for (int cut = 0; cut < cuts; ++cut) {
    Box& box = boxes[random() % boxes.size()];
    const size_t d = random() % shape.size();
    if (box.sizes[d] < 2) continue;
    Box rest = box;
    const int64_t at = 1 + static_cast<int64_t>(random()) % (box.sizes[d] - 1);
    rest.offsets[d] += at;
    rest.sizes[d] -= at;
    box.sizes[d] = at;
    boxes.push_back(rest);
  }
  return boxes;
}

TEST(BoxTest, AScalarHasOneElementAndTilesItself) {
  EXPECT_EQ(Box::whole({}).numel(), 1);
  EXPECT_TRUE(tiles({Box::whole({})}, {}));
  EXPECT_FALSE(tiles({}, {}));
  EXPECT_FALSE(tiles({Box::whole({}), Box::whole({})}, {}));
}

TEST(BoxTest, AnEmptyTensorIsTiledByNothing) {
  EXPECT_TRUE(tiles({}, {0, 5}));
  EXPECT_TRUE(tiles({Box::whole({0, 5})}, {0, 5}));
}

TEST(BoxTest, RandomCutsTileAndAnyChangeToThemDoesNot) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    const std::vector<int64_t> shape = {7, 5, 3};
    std::vector<Box> boxes = random_tiling(shape, 12, random);
    ASSERT_TRUE(tiles(boxes, shape));
    std::vector<Box> fewer(boxes.begin() + 1, boxes.end());
    EXPECT_FALSE(tiles(fewer, shape));
    std::vector<Box> doubled = boxes;
    doubled.push_back(boxes.back());
    EXPECT_FALSE(tiles(doubled, shape));
    std::vector<Box> moved = boxes;
    ++moved[random() % moved.size()].offsets[random() % 3];
    EXPECT_FALSE(tiles(moved, shape));
  }
}

TEST(BoxTest, ASwapOfEqualVolumesIsNotMistakenForATiling) {
  // Two boxes of the right volume in all, one over the other: a count of elements alone would be deceived.
  EXPECT_FALSE(tiles({{{0, 0}, {2, 2}}, {{0, 0}, {2, 2}}}, {2, 4}));
  EXPECT_FALSE(tiles({{{0, 0}, {1, 4}}, {{0, 0}, {2, 2}}}, {2, 4}));
}

TEST(BoxTest, BoxesOfAnotherRankOrOutsideAreRefused) {
  EXPECT_FALSE(tiles({{{0}, {4}}}, {2, 2}));
  EXPECT_FALSE(tiles({{{-1}, {3}}}, {2}));
  EXPECT_FALSE(tiles({{{INT64_MAX}, {2}}}, {2}));
  EXPECT_FALSE(tiles({{{0}, {-2}}}, {2}));
}

TEST(BoxTest, AHundredThousandOverlappingBoxesAreRefusedAtOnce) {
  const std::vector<Box> boxes(100'000, Box{{0, 0}, {1, 1}});
  EXPECT_FALSE(tiles(boxes, {100'000, 1}));
}

TEST(BoxTest, RunsCopyAnyPartBetweenAnyTwoBoxes) {
  std::mt19937 random(11);
  const std::vector<int64_t> shape = {4, 6, 5};
  std::vector<int> whole(Box::whole(shape).numel());
  std::iota(whole.begin(), whole.end(), 0);
  const auto cut_out = [&](const Box& box) {
    std::vector<int> values(box.numel(), -1);
    for_each_run(box, Box::whole(shape), box, [&](int64_t from, int64_t to, int64_t count) {
      std::copy_n(whole.begin() + from, count, values.begin() + to);
    });
    return values;
  };
  for (int round = 0; round < 200; ++round) {
    const Box from = random_tiling(shape, 3, random)[0], to = random_tiling(shape, 3, random).back();
    const std::vector<int> source = cut_out(from), wanted = cut_out(to);
    std::vector<int> got = wanted;
    const Box part = intersection(from, to);
    int64_t copied = 0, last = -1;
    for_each_run(part, to, to, [&](int64_t at, int64_t, int64_t n) { std::fill_n(got.begin() + at, n, -1); });
    for_each_run(part, from, to, [&](int64_t a, int64_t b, int64_t n) {
      EXPECT_GT(a, last) << "runs must rise, the reader keeps one chunk only";
      last = a;
      copied += n;
      std::copy_n(source.begin() + a, n, got.begin() + b);
    });
    EXPECT_EQ(copied, part.numel());
    EXPECT_EQ(got, wanted);
  }
}

TEST(BoxTest, WholeBoxesAreOneRun) {
  int runs = 0;
  for_each_run(Box::whole({3, 4, 5}), Box::whole({3, 4, 5}), Box::whole({3, 4, 5}), [&](int64_t, int64_t, int64_t n) {
    ++runs;
    EXPECT_EQ(n, 60);
  });
  EXPECT_EQ(runs, 1);
}

}  // namespace
}  // namespace lockstep
