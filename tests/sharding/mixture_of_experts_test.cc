// Experts that tokens are sorted to, against a loop over experts that each see all tokens, in f64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/mixture_of_experts.h>

#include "../runtime/nn/compare.h"

namespace lockstep {
namespace {

using nn::error_of;
using nn::normal;
using nn::same_bits;

const MixtureOptions kOptions{.width = 12, .ffn_width = 20, .num_experts = 5, .top_k = 2, .balance_weight = 0.5};

void initialize(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  uint64_t key = 10;
  for (auto& parameter : module.parameters()) parameter.copy_(normal(parameter.sizes(), key++) * 0.4);
}

// Every expert on every token, weighted by what the router gives it; the balance loss spelled out beside it.
struct Dense {
  MixtureOptions o;
  at::Tensor router, gate, up, down;

  explicit Dense(const MixtureOptions& options, const torch::nn::Module& module) : o(options) {
    const auto wide = [&](const char* name) {
      return module.named_parameters()[name].detach().to(at::kDouble).requires_grad_();
    };
    router = wide("router.weight"), gate = wide("gate.weight"), up = wide("up.weight"), down = wide("down.weight");
  }

  struct Output {
    at::Tensor y, balance_loss;
  };
  Output forward(const at::Tensor& x_BTC) const {
    const at::Tensor x = x_BTC.flatten(0, 1), p = x.matmul(router.t()).softmax(-1);
    const at::Tensor picked = std::get<1>(p.topk(o.top_k));
    const at::Tensor mask = at::zeros_like(p).scatter_(1, picked, 1.0);
    at::Tensor weights = p * mask;
    if (o.top_k > 1) weights = weights / weights.sum(1, true);
    at::Tensor y = at::zeros_like(x);
    for (int64_t i = 0; i < o.num_experts; ++i) {
      const auto of = [&](const at::Tensor& w, int64_t rows) { return w.narrow(0, i * rows, rows).t(); };
      const at::Tensor hidden = at::silu(x.matmul(of(gate, o.ffn_width))) * x.matmul(of(up, o.ffn_width));
      y = y + hidden.matmul(of(down, o.width)) * weights.select(1, i).unsqueeze(1);
    }
    const at::Tensor f = mask.mean(0) / static_cast<double>(o.top_k);
    const at::Tensor loss = (f * p.mean(0)).sum() * static_cast<double>(o.num_experts * x.size(0)) * o.balance_weight;
    return {y.view(x_BTC.sizes()), loss};
  }
  std::vector<at::Tensor> parameters() const { return {router, gate, up, down}; }
};

void expect_like_dense(const MixtureOptions& options, bool bf16, double bound) {
  MixtureOfExperts module(options, {});
  initialize(module);
  const at::Tensor x = normal({3, 7, options.width}, 1).requires_grad_(), slope = normal({3, 7, options.width}, 2);
  at::Tensor y;
  {
    const nn::StepScope scope({.loss_weight = 0.25F});
    const nn::AutocastGuard precision(at::kCPU, bf16);
    y = module.forward(x);
  }
  y.backward(slope);
  const Dense dense(options, module);
  const at::Tensor wide = x.detach().to(at::kDouble).requires_grad_();
  const auto exact = dense.forward(wide);
  ((exact.y * slope).sum() + 0.25 * exact.balance_loss).backward();
  EXPECT_LE(error_of(y, exact.y), bound);
  EXPECT_EQ(y.scalar_type(), at::kFloat);
  EXPECT_LE(error_of(x.grad(), wide.grad()), bound);
  const char* const names[] = {"router.weight", "gate.weight", "up.weight", "down.weight"};
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_LE(error_of(module.named_parameters()[names[i]].grad(), dense.parameters()[i].grad()), bound) << names[i];
  }
}

TEST(MixtureOfExpertsTest, OutputAndGradientsAreThoseOfEveryExpertOnEveryToken) {
  for (const int64_t top_k : {1, 2, 3, 5}) {
    MixtureOptions options = kOptions;
    options.top_k = top_k;
    SCOPED_TRACE("top_k " + std::to_string(top_k));
    expect_like_dense(options, /*bf16=*/false, 2e-6);
    expect_like_dense(options, /*bf16=*/true, 0.03);
  }
}

TEST(MixtureOfExpertsTest, WithoutBalanceWeightOrInEvaluationTheOutputsGradientIsAll) {
  MixtureOfExperts plain(
      [] {
        MixtureOptions options = kOptions;
        options.balance_weight = 0;
        return options;
      }(),
      {}),
      evaluating(kOptions, {});
  evaluating.eval();
  const at::Tensor x = normal({2, 6, 12}, 1);
  for (auto* module : {&plain, &evaluating}) {
    initialize(*module);
    module->forward(x).sum().backward();
  }
  EXPECT_TRUE(same_bits(plain.named_parameters()["router.weight"].grad(),
                        evaluating.named_parameters()["router.weight"].grad()));
}

TEST(MixtureOfExpertsTest, AnExpertWithoutTokensHasAGradientOfZeros) {
  MixtureOfExperts module(kOptions, {});
  initialize(module);
  const at::Tensor x = normal({1, 1, 12}, 3).requires_grad_();  // one token, two of five experts
  for (const bool bf16 : {false, true}) {
    module.zero_grad();
    {
      const nn::AutocastGuard precision(at::kCPU, bf16);
      module.forward(x).sum().backward();
    }
    const at::Tensor used = module.named_parameters()["gate.weight"].grad().view({5, -1}).ne(0).any(1);
    EXPECT_EQ(used.sum().item<int64_t>(), 2);
  }
}

TEST(MixtureOfExpertsTest, BitsDoNotDependOnThreads) {
  MixtureOfExperts module(kOptions, {});
  initialize(module);
  const at::Tensor x = normal({4, 33, 12}, 4);
  std::vector<at::Tensor> runs;
  for (const int threads : {1, 2}) {
    at::set_num_threads(threads);
    const at::Tensor leaf = x.clone().requires_grad_();
    const at::Tensor y = module.forward(leaf);
    y.sum().backward();
    runs.push_back(at::cat({y.detach().flatten(), leaf.grad().flatten()}));
  }
  EXPECT_TRUE(same_bits(runs[0], runs[1]));
}

TEST(MixtureOfExpertsTest, ASequenceThatIsCutHasOneBalance) {
  MixtureOptions options = kOptions;
  const at::Tensor x = normal({2, 24, 12}, 5);
  at::Tensor whole;
  {
    MixtureOfExperts module(options, {});
    initialize(module);
    module.forward(x).sum().backward();
    whole = module.named_parameters()["router.weight"].grad();
  }
  for (const int ranks : {2, 3}) {
    for (const bool by_context : {true, false}) {
      std::vector<at::Tensor> parts(ranks);
      run_local_ranks(ranks, [&](ProcessGroup& group) {
        ModelParallel parallel;
        if (by_context) {
          parallel.context.group = &group;
        } else {
          parallel.tensor = {&group, /*sequence_parallel=*/true};
        }
        MixtureOfExperts module(options, parallel);
        initialize(module);
        module.forward(x.chunk(ranks, 1)[group.rank()]).sum().backward();
        parts[group.rank()] = module.named_parameters()["router.weight"].grad();
      });
      EXPECT_LE(error_of(at::stack(parts).sum(0), whole), 2e-6) << ranks << (by_context ? " context" : " tensor");
    }
  }
}

TEST(MixtureOfExpertsRefusalTest, MoreChoicesThanExpertsSaysSo) {
  MixtureOptions options = kOptions;
  options.top_k = 6;
  try {
    MixtureOfExperts module(options, {});
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("6 of 5 experts"));
  }
}

}  // namespace
}  // namespace lockstep
