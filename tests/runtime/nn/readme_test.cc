// The examples of runtime/nn/README.md and runtime/optim/README.md, word for word.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <lockstep/nn/functions.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>
#include <lockstep/nn/precision.h>
#include <lockstep/optim/optimizer.h>
#include <lockstep/optim/schedule.h>

namespace {

TEST(ReadmeTest, TheExampleOfNnGivesGradients) {
  namespace nn = lockstep::nn;
  nn::RmsNorm norm(64);
  nn::Linear gate(64, 171, /*bias=*/false), up(64, 171, false), head(171, 1000, false);  // weights: see init.h
  nn::begin_step();                                                                      // weights may have changed
  const nn::AutocastGuard bf16(at::kCPU, true);
  const at::Tensor h = norm.forward(at::randn({32, 64}));
  const at::Tensor y = nn::swiglu(gate.forward(h), up.forward(h));
  nn::linear_cross_entropy_sum(y, head.weight, at::zeros({32}, at::kLong)).backward();

  for (const at::Tensor& weight : {norm.weight, gate.weight, up.weight, head.weight}) {
    EXPECT_EQ(weight.grad().sizes(), weight.sizes());
    EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
  }
}

TEST(ReadmeTest, TheExampleOfOptimGoesDownhill) {
  namespace optim = lockstep::optim;
  at::Tensor weight = at::ones({3, 4}), grad = at::zeros({3, 4});
  const auto optimizer = optim::make_adamw({.beta2 = 0.95, .weight_decay = 0.1});
  optimizer->attach({{"head.weight", weight, grad, /*decay=*/true}});
  const optim::ScheduleOptions schedule{.kind = "cosine", .learning_rate = 0.1, .warmup_steps = 3, .total_steps = 50};
  for (int64_t step = 0; step < schedule.total_steps; ++step) {
    grad.copy_(weight - 2);  // of half the squared distance from 2
    optimizer->step({.learning_rate = optim::learning_rate_at(schedule, step),
                     .grad_scale = optim::clip_coefficient(grad.norm().item<double>(), 1.0),
                     .step = step + 1});
  }

  EXPECT_LT((weight - 2).abs().max().item<double>(), 0.25);
}

}  // namespace
