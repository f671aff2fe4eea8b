// Experts that tokens are sorted to, against a loop over experts that each see all tokens, in f64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/types.h>

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

// Fills this rank's rows of what one rank would have.
void initialize_part(MixtureOfExperts& module, const torch::nn::Module& whole) {
  const torch::NoGradGuard no_grad;
  for (const ParameterPlacement& placement : placements(module, {})) {
    fill_part(module.named_parameters()[placement.name], placement,
              [&](const at::Tensor& values) { values.copy_(whole.named_parameters()[placement.name].detach()); });
  }
}

TEST(MixtureOfExpertsTest, ExpertsSharedByRanksGiveEachRanksTokensTheBitsOfOneRank) {
  for (const int ranks : {1, 2, 3, 4}) {
    for (const bool bf16 : {false, true}) {
      run_local_ranks(ranks, [&](ProcessGroup& group) {
        const auto pass = [&](MixtureOfExperts& module, int source) {
          // No two ranks have as many tokens, and the last one's all want the same experts.
          at::Tensor x = normal({1, 3 + 2 * source, 12}, 20 + source);
          if (source == ranks - 1) x = x.select(1, 0).unsqueeze(1).expand({1, 9, 12}).contiguous();
          x.requires_grad_();
          at::Tensor y;
          {
            const nn::AutocastGuard precision(at::kCPU, bf16);
            y = module.forward(x);
          }
          y.backward(normal(y.sizes(), 30 + source));
          return std::pair(y.detach(), x.grad());
        };
        ModelParallel parallel;
        parallel.expert.group = &group;
        const auto holder =
            std::make_shared<MixtureOfExperts>(kOptions, parallel);  // LibTorch walks shared modules alone
        MixtureOfExperts& shared = *holder;
        std::vector<std::shared_ptr<MixtureOfExperts>> alone;
        for (int source = 0; source < ranks; ++source) {
          alone.push_back(std::make_shared<MixtureOfExperts>(kOptions, ModelParallel{}));
          initialize(*alone.back());
        }
        initialize_part(shared, *alone[0]);
        const auto [y, x_grad] = pass(shared, group.rank());
        const std::string text = "rank " + std::to_string(group.rank()) + " of " + std::to_string(ranks);
        const auto uses = expert_uses(shared);
        for (int source = 0; source < ranks; ++source) {
          const auto [exact_y, exact_x_grad] = pass(*alone[source], source);
          if (source == group.rank()) {
            EXPECT_TRUE(same_bits(y, exact_y)) << text;
            EXPECT_TRUE(same_bits(x_grad, exact_x_grad)) << text;
            EXPECT_TRUE(same_bits(shared.named_parameters()["router.weight"].grad(),
                                  alone[source]->named_parameters()["router.weight"].grad()))
                << text;
          }
          for (const ParameterPlacement& placement : placements(shared, {})) {
            if (placement.name == "router.weight") continue;
            at::Tensor exact = alone[source]->named_parameters()[placement.name].grad();
            if (ranks > 1) exact = exact.narrow(0, placement.part().begin, placement.part().size);
            EXPECT_TRUE(same_bits(uses.at(placement.name)[source].grad(), exact))
                << placement.name << " from rank " << source << ", " << text;
          }
        }
      });
    }
  }
}

TEST(MixtureOfExpertsTest, TheBoxesOfSharedExpertsFillTheTensor) {
  run_local_ranks(2, [](ProcessGroup& group) {
    ModelParallel parallel;
    parallel.expert.group = &group;
    const MixtureOfExperts module(kOptions, parallel);
    for (const ParameterPlacement& placement : placements(module, {})) {
      const ShardLayout layout = shard_layout(placement, "F32", {.data = 4, .tensor = 2, .expert = 2});
      EXPECT_NO_THROW(layout.check());
      if (placement.name != "up.weight") continue;
      EXPECT_EQ(layout.boxes[0].sizes[0], 60);  // three of five experts
      EXPECT_EQ(layout.boxes[2].offsets[0], 60);
      EXPECT_EQ(layout.boxes[5], layout.boxes[0]);
      EXPECT_EQ(placement.box(), layout.boxes.at(size_t{2} * group.rank()));
    }
  });
}

TEST(MixtureOfExpertsRefusalTest, FewerExpertsThanRanksSaysSo) {
  const auto groups = make_local_world(6);
  ModelParallel parallel;
  parallel.expert.group = groups[2].get();
  try {
    MixtureOfExperts module(kOptions, parallel);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("--experts=5 are too few for --expert_parallel_size=6"));
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
