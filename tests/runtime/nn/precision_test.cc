#include <thread>

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include <lockstep/nn/linear.h>
#include <lockstep/nn/precision.h>
#include <lockstep/optim/optimizer.h>

#include "compare.h"
#include "weight_cache.h"

namespace lockstep::nn {
namespace {

TEST(AutocastGuardTest, HoldsForItsScopeAndThreadAndNests) {
  EXPECT_FALSE(is_bf16());
  {
    const AutocastGuard on(at::kCPU, true);
    EXPECT_TRUE(is_bf16());
    std::thread([] { EXPECT_FALSE(is_bf16()) << "another thread is in bf16 too"; }).join();
    EXPECT_EQ(at::linear(at::ones({2, 3}), at::ones({4, 3})).scalar_type(), at::kBFloat16);
    {
      const AutocastGuard off(at::kCPU, false);
      EXPECT_FALSE(is_bf16());
      EXPECT_EQ(at::linear(at::ones({2, 3}), at::ones({4, 3})).scalar_type(), at::kFloat);
    }
    EXPECT_TRUE(is_bf16());
  }
  EXPECT_FALSE(is_bf16());
}

TEST(AutocastGuardTest, KeepsLibTorchsCacheOffAndRestoresAllThatWasThere) {
  at::autocast::set_autocast_cache_enabled(true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kHalf);
  {
    const AutocastGuard on(at::kCPU, true);
    EXPECT_FALSE(at::autocast::is_autocast_cache_enabled());
    EXPECT_EQ(at::autocast::get_autocast_dtype(at::kCPU), at::kBFloat16);
  }
  EXPECT_TRUE(at::autocast::is_autocast_cache_enabled());
  EXPECT_EQ(at::autocast::get_autocast_dtype(at::kCPU), at::kHalf);
  EXPECT_FALSE(at::autocast::is_autocast_enabled(at::kCPU));
  at::autocast::set_autocast_enabled(at::kCPU, true);
  EXPECT_FALSE(is_bf16()) << "f16 is not bf16";
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
}

class WeightCacheTest : public testing::Test {
 protected:
  void SetUp() override { begin_step(); }
  static bool is_copy_of(const at::Tensor& copy, const at::Tensor& weight) {
    return same_bits(copy, weight.detach().to(at::kBFloat16));
  }
  at::Tensor weight = normal({17, 3}, 1).requires_grad_();
};

TEST_F(WeightCacheTest, InAScopeAWeightIsCastOnceForAllThreads) {
  const WeightCacheScope scope;
  const at::Tensor copy = bf16_weight(weight);
  EXPECT_TRUE(is_copy_of(copy, weight));
  EXPECT_FALSE(copy.requires_grad());
  EXPECT_TRUE(bf16_weight(weight).is_same(copy));
  EXPECT_TRUE(bf16_weight(weight.detach()).is_same(copy)) << "lanes have Tensors of their own over one storage";
  std::thread([&] {
    EXPECT_FALSE(bf16_weight(weight).is_same(copy)) << "a scope is of one thread";
    const WeightCacheScope own;
    EXPECT_TRUE(bf16_weight(weight).is_same(copy));
  }).join();
}

TEST_F(WeightCacheTest, OutsideOfScopesNothingIsShared) {
  const at::Tensor before = bf16_weight(weight);
  {
    const WeightCacheScope outer;
    { const WeightCacheScope inner; }
    const at::Tensor copy = bf16_weight(weight);
    EXPECT_TRUE(bf16_weight(weight).is_same(copy)) << "an inner scope's end ends the outer one";
    EXPECT_FALSE(copy.is_same(before));
  }
  const at::Tensor after = bf16_weight(weight);
  EXPECT_FALSE(bf16_weight(weight).is_same(after));
  EXPECT_TRUE(is_copy_of(after, weight));
}

TEST_F(WeightCacheTest, AnOptimizerStepAndTheNextBeginStepShowTheNewWeights) {
  const WeightCacheScope scope;
  const AutocastGuard bf16(at::kCPU, true);
  const at::Tensor x = at::eye(3), grad = normal({17, 3}, 2);
  const auto optimizer = optim::make_adamw({});
  optimizer->attach({{"weight", weight.detach(), grad, true}});
  for (int step = 1; step <= 4; ++step) {
    begin_step();
    const at::Tensor y = linear(x, weight, at::Tensor());
    EXPECT_TRUE(same_bits(y.detach(), weight.detach().to(at::kBFloat16).t())) << step;
    optimizer->step({.learning_rate = 0.5, .step = step});
  }
}

TEST_F(WeightCacheTest, ACopyThatAGraphStillHoldsIsNotOverwritten) {
  const WeightCacheScope scope;
  const at::Tensor held = bf16_weight(weight), was = held.clone();
  weight.detach().mul_(2);
  begin_step();
  EXPECT_TRUE(is_copy_of(bf16_weight(weight), weight));
  EXPECT_TRUE(same_bits(held, was));
}

TEST_F(WeightCacheTest, ACopyWhoseMemoryAloneAGraphHoldsIsNotOverwritten) {
  const WeightCacheScope scope;
  const at::Tensor held = bf16_weight(weight).variable_data(), was = held.clone();  // as autograd saves it
  weight.detach().mul_(2);
  begin_step();
  EXPECT_TRUE(is_copy_of(bf16_weight(weight), weight));
  EXPECT_TRUE(same_bits(held, was));
}

TEST_F(WeightCacheTest, AChangeThatLibTorchKnowsOfIsSeenAtOnce) {
  const WeightCacheScope scope;
  EXPECT_TRUE(is_copy_of(bf16_weight(weight), weight));
  weight.detach().add_(1);
  EXPECT_TRUE(is_copy_of(bf16_weight(weight), weight));
}

TEST_F(WeightCacheTest, ViewsOfOneAddressAreToldApart) {
  const WeightCacheScope scope;
  const at::Tensor plain = weight.detach(), square = normal({5, 5}, 2);
  for (const at::Tensor& view : {plain, plain.t(), plain.view({3, 17}), plain.view(-1), plain, plain.t()})
    EXPECT_TRUE(is_copy_of(bf16_weight(view), view)) << view.sizes();
  for (const at::Tensor& view : {square, square.t(), square}) EXPECT_TRUE(is_copy_of(bf16_weight(view), view));
  const at::Tensor wide = normal({6, 4}, 3);  // 12 elements each, from the same address
  for (const at::Tensor& view : {wide.narrow(1, 0, 2), wide.narrow(0, 0, 3), wide.slice(0, 0, 6, 2)})
    EXPECT_TRUE(is_copy_of(bf16_weight(view), view)) << view.sizes() << view.strides();
}

}  // namespace
}  // namespace lockstep::nn
