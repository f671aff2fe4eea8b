// A transformer cut along the tensor and context axes against functions of runtime/nn on one rank: the loss and the
// gradient of every parameter. Runs on threads and under mpirun.
#include "parallel_transformer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/nn/precision.h>

#include "../collectives/worlds.h"
#include "../runtime/nn/compare.h"

namespace lockstep {
namespace {

using nn::error_of;
using test::ParallelTransformer;
using test::TransformerShape;

struct Case {
  TransformerShape shape;
  int tensor = 1, context = 1;
  bool sequence_parallel = false, bf16 = false;
};
std::string text(const Case& c) {
  return "t " + std::to_string(c.tensor) + ", c " + std::to_string(c.context) + ", kv_heads " +
         std::to_string(c.shape.kv_heads) + (c.sequence_parallel ? ", sequence parallel" : "") +
         (c.bf16 ? ", bf16" : "");
}

struct Batch {
  at::Tensor tokens, targets;
};
Batch batch(const TransformerShape& s) {
  const at::Tensor ids = at::arange(s.batch * (s.length + 1)).mul(7919).remainder(s.vocab).view({s.batch, -1});
  at::Tensor targets = ids.narrow(1, 1, s.length).contiguous();
  targets.select(1, 3).fill_(nn::kIgnore);
  return {ids.narrow(1, 0, s.length).contiguous(), targets};
}

struct Step {
  at::Tensor loss;
  std::map<std::string, at::Tensor> grads;
};

// One rank, functions of runtime/nn, weights by name.
Step plain_step(const Case& c, bool bf16) {
  ParallelTransformer whole(c.shape, {}, {});
  whole.initialize();
  std::map<std::string, at::Tensor> weights;
  for (const auto& item : whole.named_parameters()) weights[item.key()] = item.value();
  const nn::StepScope scope({.seed = 3, .step = 5, .leaf = 1});
  const nn::AutocastGuard precision(at::kCPU, bf16);
  const auto [tokens, targets] = batch(c.shape);
  Step step{plain_loss_sum(c.shape, weights, tokens, targets), {}};
  (step.loss * 0.7).backward();
  for (const auto& item : whole.named_parameters()) step.grads[item.key()] = item.value().grad();
  return step;
}

void expect_the_same_step(ProcessGroup& world, const Case& c) {
  Mesh mesh(world, {.context = c.context, .tensor = c.tensor});
  const TensorParallel tp{&mesh.tensor(), c.sequence_parallel};
  ParallelTransformer model(c.shape, tp, {&mesh.context()});
  model.initialize();
  const bool is_alone = c.tensor * c.context == 1;
  const Step plain = plain_step(c, c.bf16 && is_alone), plain16 = plain_step(c, c.bf16);
  at::Tensor loss;
  {
    const nn::StepScope scope({.seed = 3, .step = 5, .leaf = 1});
    const nn::AutocastGuard precision(at::kCPU, c.bf16);
    const auto [tokens, targets] = batch(c.shape);
    loss = model.loss_sum(tokens, targets);
    (loss * 0.7).backward();
  }
  const auto all = placements(model, tp);
  std::vector<at::Tensor> grads;
  for (const auto& parameter : model.parameters()) grads.push_back(parameter.grad());
  reduce_partial_gradients(all, grads, tp);
  at::Tensor sum = loss.detach().clone();
  mesh.context().all_reduce(sum).wait();

  EXPECT_LE(error_of(sum, plain.loss), is_alone ? 0 : c.bf16 ? 2e-3 : 1e-5) << text(c);
  for (size_t i = 0; i < all.size(); ++i) {
    mesh.context().all_reduce(grads[i]).wait();
    // The exact value of this one is zero: softmax does not see what is added to all scores.
    if (all[i].name.find("key.bias") != std::string::npos) continue;
    const at::Tensor& whole = plain.grads.at(all[i].name);
    at::Tensor expected = whole;
    if (all[i].tensor_dim >= 0) {
      const Part part = all[i].part();
      expected = expected.narrow(all[i].tensor_dim, part.begin, part.size);
    }
    // In bf16 not much farther from f32 than one rank is: each partial sum is rounded too.
    const double bound = is_alone ? 0 : c.bf16 ? 4 * error_of(plain16.grads.at(all[i].name), whole) : 1e-5;
    const double error = (grads[i] - expected).abs().max().item<double>() / whole.abs().max().item<double>();
    EXPECT_LE(error, bound) << all[i].name << ", rank " << world.rank() << ", " << text(c);
    EXPECT_EQ(grads[i].scalar_type(), at::kFloat);
  }
  mesh.close();
}

class ParallelTransformerTest : public testing::TestWithParam<World> {};
std::vector<World> small_worlds() {
  std::vector<World> small;
  for (const World& world : worlds()) {
    if (world.size <= 4 && world.call_limit_elements == 0) small.push_back(world);
  }
  return small;
}
INSTANTIATE_TEST_SUITE_P(Worlds, ParallelTransformerTest, testing::ValuesIn(small_worlds()),
                         [](const auto& world) { return world.param.name; });

TEST_P(ParallelTransformerTest, LossAndGradientsAreThoseOfOneRank) {
  const int size = GetParam().size;
  run_ranks(GetParam(), [&](ProcessGroup& world) {
    for (const int64_t kv_heads : {4, 1}) {
      for (const bool sequence_parallel : {false, true})
        expect_the_same_step(world, {{.kv_heads = kv_heads, .dropout = 0.2}, size, 1, sequence_parallel});
    }
    if (size != 3) expect_the_same_step(world, {{.kv_heads = 2}, size, 1, true});
    expect_the_same_step(world, {{}, 1, size});
    if (size == 4) expect_the_same_step(world, {{.kv_heads = 2}, 2, 2, true});
  });
}

TEST_P(ParallelTransformerTest, InBf16TheyDifferByRoundings) {
  const int size = GetParam().size;
  run_ranks(GetParam(), [&](ProcessGroup& world) {
    for (const bool sequence_parallel : {false, true})
      expect_the_same_step(world, {{.dropout = 0.2}, size, 1, sequence_parallel, /*bf16=*/true});
    expect_the_same_step(world, {{}, 1, size, false, /*bf16=*/true});
  });
}

}  // namespace
}  // namespace lockstep
