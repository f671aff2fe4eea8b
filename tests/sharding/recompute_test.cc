// The oracle is the run that keeps everything: recomputed gradients must have its bits.
#include <array>
#include <chrono>
#include <cstdio>
#include <thread>

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Resize.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/nn/precision.h>
#include <lockstep/nn/remake.h>
#include <lockstep/sharding/recompute.h>

#include "transformer.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

// One micro-batch; the output's gradient is made up.
std::vector<at::Tensor> gradients(Stack& stack, const at::Tensor& x, Recompute how, bool bf16, uint64_t leaf = 0,
                                  const RecomputeHooks& hooks = {}) {
  const nn::StepScope randomness({5, 7, leaf});
  const nn::WeightCacheScope share_casts;
  at::Tensor y;
  {
    const nn::AutocastGuard autocast(at::kCPU, bf16);
    y = stack.forward(x, how, hooks);
  }
  torch::autograd::backward({y}, {normal(y.sizes(), 23 + leaf).to(y.scalar_type())});
  auto all = stack.take_gradients();
  all.push_back(y.detach());
  all.push_back(x.grad());
  x.mutable_grad().reset();
  return all;
}

template <typename Body>
std::string failure_of(Body body) {
  try {
    body();
  } catch (const CheckFailed& error) {
    return error.what();
  }
  return "no CheckFailed";
}

class RecomputeTest : public testing::Test {
 protected:
  void SetUp() override {
    at::set_num_threads(1);
    nn::install_cpu_allocator();
  }
};

TEST_F(RecomputeTest, GradientsHaveTheBitsOfARunThatKeepsEverything) {
  for (const bool is_llama : {false, true}) {
    for (const bool bf16 : {false, true}) {
      Stack stack(3, {}, is_llama);
      const at::Tensor x = normal({2, 12, 32}, 1).requires_grad_();
      nn::begin_step();
      const auto kept = gradients(stack, x, Recompute::kNone, bf16);
      EXPECT_EQ(num_different(kept, gradients(stack, x, Recompute::kNone, bf16)), 0);
      EXPECT_NE(num_different(kept, gradients(stack, x, Recompute::kNone, bf16, /*leaf=*/1)), 0) << "dropout is on";
      for (const auto how : {Recompute::kSelective, Recompute::kFull}) {
        EXPECT_EQ(num_different(kept, gradients(stack, x, how, bf16)), 0)
            << (is_llama ? "llama " : "gpt ") << (bf16 ? "bf16 " : "fp32 ") << static_cast<int>(how);
      }
      EXPECT_EQ(num_different(kept, gradients(stack, x, Recompute::kFull, bf16, 0, {.is_checked = true})), 0);
    }
  }
}

TEST_F(RecomputeTest, NoInputHasToRequireGrad) {
  Stack stack(2, {}, /*is_llama=*/false);
  const at::Tensor x = normal({2, 12, 32}, 1);
  const auto kept = gradients(stack, x, Recompute::kNone, false);
  EXPECT_EQ(num_different(kept, gradients(stack, x, Recompute::kSelective, false)), 0);
  EXPECT_EQ(num_different(kept, gradients(stack, x, Recompute::kFull, false)), 0);
}

TEST_F(RecomputeTest, LanesAtOnceGetTheirOwnBits) {
  constexpr int kLanes = 4;
  std::vector<std::vector<at::Tensor>> kept, again(kLanes);
  std::vector<Stack> stacks;
  stacks.reserve(kLanes);
  for (int i = 0; i < kLanes; ++i) stacks.emplace_back(3, BlockSizes(), /*is_llama=*/i % 2 == 1);
  nn::begin_step();
  const auto lane = [&](int i, Recompute how) {
    at::set_num_threads(1);
    Stack& stack = stacks[static_cast<size_t>(i)];
    const at::Tensor x = normal({2, 12, 32}, 1).requires_grad_();
    std::vector<at::Tensor> all;
    for (uint64_t leaf = 0; leaf < 3; ++leaf) {
      for (auto& tensor : gradients(stack, x, how, /*bf16=*/i >= 2, leaf)) all.push_back(tensor);
    }
    return all;
  };
  for (int i = 0; i < kLanes; ++i) kept.push_back(lane(i, Recompute::kNone));
  for (const auto how : {Recompute::kSelective, Recompute::kFull}) {
    std::array<std::thread, kLanes> threads;
    for (int i = 0; i < kLanes; ++i) threads[i] = std::thread([&, i] { again[i] = lane(i, how); });
    for (auto& thread : threads) thread.join();
    for (int i = 0; i < kLanes; ++i) EXPECT_EQ(num_different(kept[i], again[i]), 0) << i;
  }
}

TEST_F(RecomputeTest, BackwardMayRunOnAnotherThreadInAnotherState) {
  Stack stack(2, {}, /*is_llama=*/true);
  const at::Tensor x = normal({2, 12, 32}, 1).requires_grad_();
  const auto kept = gradients(stack, x, Recompute::kNone, /*bf16=*/true);
  for (const auto how : {Recompute::kSelective, Recompute::kFull}) {
    at::Tensor y;
    {
      const nn::StepScope randomness({5, 7, 0});
      const nn::AutocastGuard autocast(at::kCPU, true);
      y = stack.forward(x, how);
    }
    std::thread([&] {
      at::set_num_threads(1);
      const nn::StepScope randomness({1, 2, 3});
      torch::autograd::backward({y}, {normal(y.sizes(), 23).to(y.scalar_type())});
      EXPECT_EQ(nn::step_key().leaf, 3u);
      EXPECT_FALSE(nn::is_bf16());
      EXPECT_FALSE(nn::WeightCacheScope::is_on());
    }).join();
    auto all = stack.take_gradients();
    all.push_back(y.detach());
    all.push_back(x.grad());
    x.mutable_grad().reset();
    EXPECT_EQ(num_different(kept, all), 0) << static_cast<int>(how);
  }
}

// Looks at the thread's state where a second run has just ended.
struct Probe : torch::autograd::Function<Probe> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
    ctx->save_for_backward({x});
    return x.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    ctx->get_saved_variables();
    EXPECT_FALSE(at::GradMode::is_enabled());
    EXPECT_FALSE(nn::is_bf16());
    EXPECT_EQ(at::autocast::get_autocast_dtype(at::kCPU), at::kHalf);
    EXPECT_EQ(nn::step_key().leaf, 3u);
    EXPECT_FALSE(nn::WeightCacheScope::is_on());
    return grads;
  }
};

TEST_F(RecomputeTest, TheRestOfBackwardFindsItsOwnStateAgain) {
  const at::Tensor x = normal({4}, 1).requires_grad_();
  for (const auto how : {Recompute::kSelective, Recompute::kFull}) {
    at::Tensor y;
    {
      const nn::StepScope randomness({5, 7, 0});
      const nn::WeightCacheScope share_casts;
      const nn::AutocastGuard autocast(at::kCPU, true);
      y = recompute(how, [=] { return Probe::apply(nn::gelu(x)); });
    }
    const nn::StepScope randomness({1, 2, 3});
    at::autocast::set_autocast_dtype(at::kCPU, at::kHalf);
    y.sum().backward();
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
}

TEST_F(RecomputeTest, WhatLibTorchDrawsIsDrawnAgain) {
  const at::Tensor x = normal({7, 5}, 1).requires_grad_();
  const auto gradient_and_what_comes_after = [&](Recompute how) {
    const nn::StepScope randomness({5, 7, 0});
    at::Tensor y = x * torch::rand({5});
    for (int layer = 0; layer < 3; ++layer)
      y = recompute(how, [y] { return at::tanh(at::dropout(y, 0.5, true)) * torch::rand_like(y); });
    y = y * torch::rand({5});
    y.sum().backward();
    const at::Tensor gradient = x.grad().clone();
    x.mutable_grad().reset();
    return std::vector{gradient, y.detach(), torch::rand({5})};
  };
  const auto kept = gradient_and_what_comes_after(Recompute::kNone);
  EXPECT_GT(kept[0].count_nonzero().item<int64_t>(), 0);
  for (const auto how : {Recompute::kSelective, Recompute::kFull})
    EXPECT_EQ(num_different(kept, gradient_and_what_comes_after(how)), 0) << static_cast<int>(how);
}

TEST_F(RecomputeTest, TheOutermostOfNestedCallsDecides) {
  Stack stack(3, {}, /*is_llama=*/false);
  const at::Tensor x = normal({2, 12, 32}, 1).requires_grad_();
  const auto kept = gradients(stack, x, Recompute::kNone, false);
  const nn::StepScope randomness({5, 7, 0});
  for (const auto outer : {Recompute::kSelective, Recompute::kFull}) {
    int runs = 0;
    const at::Tensor y = recompute(outer, [&] {
      ++runs;
      return stack.forward(x, Recompute::kFull, {.before_rerun = [] { ADD_FAILURE() << "of an inner call"; }});
    });
    torch::autograd::backward({y}, {normal(y.sizes(), 23)});
    EXPECT_EQ(runs, outer == Recompute::kFull ? 2 : 1);
    auto all = stack.take_gradients();
    all.push_back(y.detach());
    all.push_back(x.grad());
    x.mutable_grad().reset();
    EXPECT_EQ(num_different(kept, all), 0);
  }
}

TEST_F(RecomputeTest, BackwardTwiceOverARetainedGraphGivesTheSameBits) {
  Stack stack(2, {}, /*is_llama=*/true);
  const at::Tensor x = normal({2, 12, 32}, 1).requires_grad_();
  for (const auto how : {Recompute::kSelective, Recompute::kFull}) {
    const nn::StepScope randomness({5, 7, 0});
    const at::Tensor y = stack.forward(x, how), grad = normal(y.sizes(), 23);
    torch::autograd::backward({y}, {grad}, /*retain_graph=*/true);
    const auto first = stack.take_gradients();
    torch::autograd::backward({y}, {grad});
    EXPECT_EQ(num_different(first, stack.take_gradients()), 0);
    EXPECT_ANY_THROW(torch::autograd::backward({y}, {grad})) << "the graph is gone";
    stack.take_gradients();
    x.mutable_grad().reset();
  }
}

TEST_F(RecomputeTest, GradientHooksFireOnceAndNotWhileABodyRuns) {
  struct Count : torch::autograd::PostAccumulateGradHook {
    explicit Count(const bool& is_inside, int& fired) : is_inside(is_inside), fired(fired) {}
    void operator()(const at::Tensor&) override {
      EXPECT_FALSE(is_inside);
      ++fired;
    }
    const bool& is_inside;
    int& fired;
  };
  Stack stack(1, {}, /*is_llama=*/false);
  bool is_inside = false;
  std::vector<int> fired(stack.blocks[0].parameters.size());
  for (size_t i = 0; i < fired.size(); ++i) {
    torch::autograd::impl::set_post_acc_grad_hooks(stack.blocks[0].parameters[i],
                                                   std::make_unique<Count>(is_inside, fired[i]));
  }
  recompute(
      [&] {
        is_inside = true;
        at::Tensor y = stack.blocks[0].forward(normal({1, 12, 32}, 1));
        is_inside = false;
        return y;
      },
      {.after_rerun = [&] { is_inside = false; }})  // a second run stops early
      .sum()
      .backward();
  for (size_t i = 0; i < fired.size(); ++i) EXPECT_EQ(fired[i], i == 7 ? 0 : 1) << i;  // 7 is Llama's
}

TEST_F(RecomputeTest, ABodyThatSavesOtherTensorsTheSecondTimeIsNamed) {
  const at::Tensor x = normal({4, 4}, 1).requires_grad_();
  int run = 0;
  const auto fails = [&](const std::function<at::Tensor()>& body, const RecomputeHooks& hooks = {}) {
    run = 0;
    return failure_of([&] { recompute(body, hooks).sum().backward(); });
  };
  EXPECT_THAT(fails([&] { return run++ == 0 ? x.sin().exp().sin() : x.sin(); }), HasSubstr("saved 2 tensors and 0"));
  EXPECT_THAT(fails([&] { return run++ == 0 ? (x * 2).exp().sin() : (x * 2).narrow(0, 0, 2).exp().sin(); }),
              HasSubstr("is [2, 4]"));
  EXPECT_THAT(fails([&] { return run++ == 0 ? (x * 2).exp() : (x * 2).exp().sin(); }, {.is_checked = true}),
              HasSubstr("other bits"));
  EXPECT_THAT(fails([&] { return (x * ++run).exp(); }, {.is_checked = true}), HasSubstr("other bits"));
  EXPECT_THAT(fails([&] { return (x * 2).exp(); }, {.is_checked = true}), HasSubstr("no CheckFailed"));
}

TEST_F(RecomputeTest, AnInputChangedInPlaceInBetweenIsNamed) {
  for (const auto how : {Recompute::kSelective, Recompute::kFull}) {
    const at::Tensor w = normal({4}, 1).requires_grad_(), x = normal({4}, 2);
    const at::Tensor y = recompute(how, [=] { return nn::gelu(x * w); });
    x.add_(1);
    EXPECT_THAT(failure_of([&] { y.sum().backward(); }), HasSubstr("version")) << static_cast<int>(how);
  }
}

TEST_F(RecomputeTest, AnOutputChangedInPlaceIsNotTakenForWhatItsFunctionMade) {
  const at::Tensor x = normal({4, 8}, 1).requires_grad_(), w = normal({4, 8}, 2).requires_grad_();
  std::vector<std::vector<at::Tensor>> all;
  for (const auto how : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
    const at::Tensor y = recompute(how, [=] {
      const at::Tensor h = nn::rms_norm(nn::gelu(x), at::ones({8}), 1e-5);
      h.mul_(3);
      return h * w;
    });
    all.push_back(torch::autograd::grad({y.sum()}, {x, w}));
  }
  EXPECT_EQ(num_different(all[0], all[1]), 0);
  EXPECT_EQ(num_different(all[0], all[2]), 0);
}

TEST_F(RecomputeTest, BackwardInsideALayerIsRefused) {
  const at::Tensor x = normal({4}, 1).requires_grad_();
  EXPECT_THAT(failure_of([&] {
                recompute([&] {
                  at::Tensor y = (x * 2).exp();
                  y.sum().backward();
                  return y;
                });
              }),
              HasSubstr("backward inside"));
}

TEST_F(RecomputeTest, WhatIsThrownComesOutAsItIsAndLeavesACleanState) {
  struct Odd : std::runtime_error {
    using std::runtime_error::runtime_error;
  };
  Stack stack(2, {}, /*is_llama=*/false);
  const at::Tensor x = normal({2, 12, 32}, 1).requires_grad_();
  const auto kept = gradients(stack, x, Recompute::kNone, false);
  const int64_t before = nn::cpu_memory().current_bytes;
  for (const auto how : {Recompute::kSelective, Recompute::kFull}) {
    EXPECT_THROW(recompute(how,
                           [&]() -> at::Tensor {
                             stack.blocks[0].forward(x);
                             throw Odd("first run");
                           }),
                 Odd);
    int begun = 0, ended = 0;
    const RecomputeHooks hooks{.before_rerun = [&] { ++begun; }, .after_rerun = [&] { ++ended; }};
    int runs = 0;
    const auto body = [&] {
      const at::Tensor y = nn::remakeable(x.exp(), {x}, [](const auto&) -> at::Tensor { throw Odd("made again"); });
      if (++runs > 1) throw Odd("second run");
      return y.sin();
    };
    EXPECT_THROW(recompute(how, body, hooks).sum().backward(), Odd);
    EXPECT_EQ(begun, 1);
    EXPECT_EQ(ended, 1);
    EXPECT_TRUE(at::GradMode::is_enabled());
    x.mutable_grad().reset();
    EXPECT_EQ(nn::cpu_memory().current_bytes, before);
    EXPECT_EQ(num_different(kept, gradients(stack, x, how, false)), 0);
  }
}

TEST_F(RecomputeTest, WeightsMayBeFreedAndGatheredAgain) {
  for (const bool bf16 : {false, true}) {
    Stack stack(3, {}, /*is_llama=*/true);
    const at::Tensor x = normal({2, 12, 32}, 1).requires_grad_();
    nn::begin_step();
    const auto kept = gradients(stack, x, Recompute::kNone, bf16);
    std::vector<at::Tensor> bytes;
    for (const auto& block : stack.blocks) {
      for (const auto& parameter : block.parameters) bytes.push_back(parameter.detach().clone());
    }
    const auto gather = [&](size_t i) {
      for (size_t p = 0; p < stack.blocks[i].parameters.size(); ++p) {
        const at::Tensor& weight = stack.blocks[i].parameters[p];
        const at::Tensor& whole = bytes[i * stack.blocks[i].parameters.size() + p];
        at::native::resize_bytes_cpu(weight.storage().unsafeGetStorageImpl(), whole.nbytes());
        std::memcpy(weight.storage().mutable_data(), whole.const_data_ptr(), whole.nbytes());
      }
    };
    const auto free = [&](size_t i) {
      for (const auto& weight : stack.blocks[i].parameters) {
        at::native::resize_bytes_cpu(weight.storage().unsafeGetStorageImpl(), 0);
      }
    };
    const nn::StepScope randomness({5, 7, 0});
    at::Tensor y = x;
    {
      const nn::AutocastGuard autocast(at::kCPU, bf16);
      for (size_t i = 0; i < stack.blocks.size(); ++i) {
        y = recompute([&block = stack.blocks[i], y] { return block.forward(y); }, {.before_rerun = [=] { gather(i); }});
        free(i);
      }
    }
    torch::autograd::backward({y}, {normal(y.sizes(), 23).to(y.scalar_type())});
    auto all = stack.take_gradients();
    all.push_back(y.detach());
    all.push_back(x.grad());
    EXPECT_EQ(num_different(kept, all), 0) << (bf16 ? "bf16" : "fp32");
  }
}

// Bytes above what was in use before, at most.
int64_t peak_of(Stack& stack, const at::Tensor& x, Recompute how, bool bf16) {
  gradients(stack, x, how, bf16);
  nn::reset_peaks();
  const int64_t before = nn::cpu_memory().current_bytes;
  gradients(stack, x, how, bf16);
  return nn::cpu_memory().peak_bytes - before;
}

TEST_F(RecomputeTest, AStackHoldsItsBoundariesAndAboutOneLayer) {
  const BlockSizes sizes{.width = 64, .heads = 4, .length = 256, .dropout = 0.1};
  const at::Tensor x = normal({4, 256, 64}, 1);
  const auto boundary = static_cast<int64_t>(x.nbytes());
  Stack one(1, sizes, false), twelve(12, sizes, false);
  for (const bool bf16 : {false, true}) {
    const int64_t layer = peak_of(one, x, Recompute::kNone, bf16), none = peak_of(twelve, x, Recompute::kNone, bf16),
                  selective = peak_of(twelve, x, Recompute::kSelective, bf16),
                  full = peak_of(twelve, x, Recompute::kFull, bf16);
    EXPECT_GT(none, 8 * layer);
    EXPECT_LT(full, layer + 14 * boundary * 5 / 4) << "blocks of the allocator are up to a quarter larger";
    EXPECT_LT(selective, 3 * none / 4);
    EXPECT_LT(full, selective);
  }
}

// A table for the README: --gtest_also_run_disabled_tests --gtest_filter=*Cost*
TEST_F(RecomputeTest, DISABLED_CostOfABlock) {
  const BlockSizes sizes{.width = 384, .heads = 6, .length = 256, .dropout = 0};
  const at::Tensor x = normal({4, 256, 384}, 1);
  for (const bool is_llama : {false, true}) {
    Stack stack(6, sizes, is_llama);
    for (const bool bf16 : {false, true}) {
      std::vector<double> best(3, 1e9);
      for (int round = 0; round < 7; ++round) {
        for (const auto how : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
          const auto start = std::chrono::steady_clock::now();
          gradients(stack, x, how, bf16);
          const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
          best[static_cast<size_t>(how)] = std::min(best[static_cast<size_t>(how)], took.count());
        }
      }
      for (const auto how : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
        std::printf("%s %s %-9s %7.1f ms  %6.1f MiB\n", is_llama ? "llama" : "gpt2", bf16 ? "bf16" : "fp32",
                    std::array{"none", "selective", "full"}[static_cast<size_t>(how)], best[static_cast<size_t>(how)],
                    static_cast<double>(peak_of(stack, x, how, bf16)) / (1 << 20));
      }
    }
  }
}

}  // namespace
}  // namespace lockstep
