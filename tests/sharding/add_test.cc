// The exact sum of squares by LibTorch's kernels, which GPUs use, against the CPU's own: here on CPU tensors.
#include "add.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>
#include <torch/types.h>

namespace lockstep {
namespace {

void expect_same(const std::vector<at::Tensor>& tensors) {
  const ExactSum ours = squares_of(tensors), theirs = squares_by_kernels(tensors);
  EXPECT_EQ(ours.has_non_finite(), theirs.has_non_finite());
  if (!ours.has_non_finite()) {
    EXPECT_EQ(ours.value(), theirs.value());
  }
}

TEST(SquaresTest, KernelsGiveTheSameBitsForAnyMagnitudes) {
  at::manual_seed(1);
  const at::Tensor normal = at::randn({100'003}), scale = at::pow(2.0, at::randint(-60, 60, {100'003}).to(at::kFloat));
  expect_same({normal});
  expect_same({normal * scale});
  expect_same({normal * 1e-30, at::zeros({5}), normal * 1e15, at::empty({0})});  // bins that are far apart
  expect_same({at::full({3}, std::numeric_limits<float>::max()), at::full({2}, 1e-42)});
  expect_same({at::zeros({3})});
  expect_same({});
}

TEST(SquaresTest, ALargeTensorIsTakenInPieces) {
  at::manual_seed(2);
  expect_same({at::randn({(1 << 23) + 77}) * 1e3});
}

TEST(SquaresTest, WhatIsNotFiniteIsSeen) {
  for (const float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    at::Tensor x = at::ones({1000});
    x[517] = bad;
    EXPECT_TRUE(squares_by_kernels({at::ones({3}), x}).has_non_finite()) << bad;
  }
}

}  // namespace
}  // namespace lockstep
