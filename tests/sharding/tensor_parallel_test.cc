// Functions and layers of the tensor axis against one rank.
#include <array>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/tensor_parallel.h>

#include "../runtime/nn/compare.h"

namespace lockstep {
namespace {

using nn::error_of;
using nn::normal;
using testing::HasSubstr;

constexpr double kBound = 1e-5;  // relative to the tensor's largest element

class TensorParallelTest : public testing::TestWithParam<int> {};  // tensor-parallel size
INSTANTIATE_TEST_SUITE_P(Sizes, TensorParallelTest, testing::Values(1, 2, 3, 4));

at::Tensor sum_of(int size, const std::function<at::Tensor(int)>& term) {  // in rank order, rounded once
  at::Tensor sum = term(0).to(at::kFloat);
  for (int rank = 1; rank < size; ++rank) sum = sum + term(rank);
  return sum.to(term(0).scalar_type());
}
at::Tensor joined(int size, const std::function<at::Tensor(int)>& part) {
  std::vector<at::Tensor> all(size);
  for (int rank = 0; rank < size; ++rank) all[rank] = part(rank);
  return at::cat(all, 1);
}

TEST_P(TensorParallelTest, FunctionsAndTheirGradientsAreSumsInRankOrderAndParts) {
  const int size = GetParam();
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    for (const int64_t width : {int64_t{5}, int64_t{4999}}) {  // the larger travels in pieces
      run_local_ranks(size, [&](ProcessGroup& group) {
        const TensorParallel tp{&group};
        const int rank = group.rank();
        const int64_t begin = int64_t{2} * rank, length = int64_t{2} * size;
        const auto part = [&](const at::Tensor& x) { return x.narrow(1, begin, 2); };
        const auto whole_of = [&](int r) { return normal({3, length, width}, 10 + r, type); };
        const auto part_of = [&](int r) { return normal({3, 2, width}, 20 + r, type); };
        const auto check = [&](const char* what, auto function, const at::Tensor& x, const at::Tensor& upstream,
                               const at::Tensor& y, const at::Tensor& x_grad) {
          const nn::Pass pass = nn::run([&](const nn::Tensors& t) { return function(t[0], tp); }, {x},
                                        [&](const at::Tensor&) { return upstream; });
          EXPECT_TRUE(same_bits(pass.output, y)) << what << " forward, rank " << rank << " of " << size;
          EXPECT_TRUE(same_bits(pass.grads[0], x_grad)) << what << " backward, rank " << rank << " of " << size;
        };
        const at::Tensor whole = whole_of(rank), mine = part_of(rank), sum = sum_of(size, whole_of);
        check("copy_to", copy_to, whole, whole, whole, sum);
        check("reduce_from", reduce_from, whole, whole, sum, whole);
        check("gather_sequence", gather_sequence, mine, whole, joined(size, part_of), part(sum));
        check("reduce_scatter_sequence", reduce_scatter_sequence, whole, mine, part(sum), joined(size, part_of));
        check("scatter_sequence", scatter_sequence, whole, mine, part(whole), joined(size, part_of));
      });
    }
  }
}

// A column- and a row-parallel layer around a GELU, and the same of nn::Linear.
struct Mlp : torch::nn::Module {
  Mlp(bool bias, const TensorParallel& tp) {
    up = register_module("up", std::make_shared<ColumnParallelLinear>(12, 11, bias, tp));
    down = register_module("down", std::make_shared<RowParallelLinear>(11, 7, bias, tp));
    for (const auto& placement : placements(*this, tp))
      fill_part(named_parameters()[placement.name], placement,
                [&](const at::Tensor& whole) { nn::fill_normal(whole, 5, placement.name, 1); });
  }
  at::Tensor forward(const at::Tensor& x) { return down->forward(nn::gelu(up->forward(x))); }
  std::shared_ptr<ColumnParallelLinear> up;
  std::shared_ptr<RowParallelLinear> down;
};

void expect_the_plain_mlp(bool bias, const TensorParallel& tp, bool bf16) {
  const std::string text = std::string(bias ? "bias" : "no bias") + (bf16 ? ", bf16" : "") +
                           (tp.sequence_parallel ? ", sequence parallel" : "") + ", size " + std::to_string(tp.size());
  const nn::AutocastGuard precision(at::kCPU, bf16);
  Mlp mlp(bias, tp);
  nn::Linear up(12, 11, bias), down(11, 7, bias);
  std::map<std::string, at::Tensor> plain = {{"up.weight", up.weight}, {"down.weight", down.weight}};
  if (bias) plain["up.bias"] = up.bias, plain["down.bias"] = down.bias;
  for (auto& [name, weight] : plain) nn::fill_normal(weight, 5, name, 1);

  const int64_t tokens = int64_t{2} * tp.size();
  const at::Tensor x = normal({3, tokens, 12}, 1).requires_grad_(), x_plain = x.detach().clone().requires_grad_();
  const Part part = sequence_part(tokens, tp);
  const at::Tensor y = mlp.forward(tp.is_sequence_parallel() ? x.narrow(1, part.begin, part.size) : x),
                   y_plain = down.forward(nn::gelu(up.forward(x_plain))), slope = normal({3, tokens, 7}, 2);
  (y * slope.narrow(1, part.begin, part.size)).sum().backward();
  (y_plain * slope).sum().backward();

  const double bound = !tp.is_parallel() ? 0 : bf16 ? 0.02 : kBound;
  EXPECT_LE(error_of(y, y_plain.narrow(1, part.begin, part.size)), bound) << text;
  EXPECT_EQ(y.scalar_type(), y_plain.scalar_type()) << text;
  EXPECT_LE(error_of(x.grad().narrow(1, part.begin, part.size), x_plain.grad().narrow(1, part.begin, part.size)), bound)
      << text;
  const auto all = placements(mlp, tp);
  std::vector<at::Tensor> grads;
  for (const auto& parameter : mlp.parameters()) grads.push_back(parameter.grad());
  reduce_partial_gradients(all, grads, tp);
  for (size_t i = 0; i < all.size(); ++i) {
    at::Tensor expected = plain.at(all[i].name).grad();
    if (all[i].tensor_dim >= 0) expected = expected.narrow(all[i].tensor_dim, all[i].part().begin, all[i].part().size);
    EXPECT_LE(error_of(grads[i], expected), bound) << all[i].name << ", " << text;
    EXPECT_EQ(grads[i].scalar_type(), at::kFloat);
  }
}

TEST_P(TensorParallelTest, LayersAreThePlainOnes) {
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    for (const bool bias : {false, true}) {
      for (const bool sequence_parallel : {false, true}) {
        for (const bool bf16 : {false, true}) expect_the_plain_mlp(bias, {&group, sequence_parallel}, bf16);
      }
    }
  });
}

TEST_P(TensorParallelTest, InitialWeightsAndLayoutsDoNotDependOnTheSize) {
  const int size = GetParam();
  Mlp whole(true, {});
  run_local_ranks(size, [&](ProcessGroup& group) {
    const TensorParallel tp{&group, /*sequence_parallel=*/true};
    const Mlp mlp(true, tp);
    const MeshShape mesh{.pipeline = 2, .data = 2, .context = 1, .tensor = size};
    for (const auto& placement : placements(mlp, tp)) {
      at::Tensor expected = whole.named_parameters()[placement.name];
      EXPECT_EQ(placement.shape, expected.sizes().vec());
      const Box box = placement.box();
      for (size_t dim = 0; dim < box.sizes.size(); ++dim)
        expected = expected.narrow(static_cast<int64_t>(dim), box.offsets[dim], box.sizes[dim]);
      EXPECT_TRUE(same_bits(mlp.named_parameters()[placement.name], expected)) << placement.name;
      EXPECT_EQ(placement.is_partial, size > 1 && placement.name == "down.bias") << placement.name;
      EXPECT_EQ(placement.tensor_dim, placement.name == "down.weight" ? 1 : placement.name == "down.bias" ? -1 : 0);

      const ShardLayout layout = shard_layout(placement, "F32", mesh), stage = shard_layout(placement, "F32", mesh, 1);
      EXPECT_NO_THROW(layout.check());
      EXPECT_NO_THROW(stage.check());
      EXPECT_EQ(layout.boxes.size(), 4U * size);
      EXPECT_EQ(layout.boxes[2 * size + group.rank()], box);
      EXPECT_EQ(stage.boxes[2 * size + group.rank()], box);
      EXPECT_EQ(stage.boxes[group.rank()].numel(), 0);
    }
  });
}

TEST_P(TensorParallelTest, EachPartIsCountedByItsFirstHolder) {
  const int size = GetParam();
  run_local_ranks(size, [&](ProcessGroup& group) {
    const TensorParallel tp{&group};
    torch::nn::Module model;
    const HeadSplit split = split_heads(12, 1, tp);
    model.register_module("key", std::make_shared<ColumnParallelLinear>(4, 1, false, tp, split.kv_heads));
    model.register_module("query", std::make_shared<ColumnParallelLinear>(4, 12, false, tp, split.heads));
    model.register_module("norm", std::make_shared<nn::Linear>(4, 4));
    for (const auto& placement : placements(model, tp)) {
      EXPECT_EQ(placement.is_first_holder(), placement.name.starts_with("query") || group.rank() == 0);
      EXPECT_EQ(placement.is_partial, placement.name.starts_with("key") && size > 1) << placement.name;
    }
  });
}

TEST_P(TensorParallelTest, DropoutOutsideRegionsIsThatOfOneRank) {
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const nn::StepScope scope({.seed = 3, .step = 2, .leaf = 1});
    const TensorParallel tp{&group, /*sequence_parallel=*/true};
    const int64_t length = int64_t{3} * group.size();
    const Part part = sequence_part(length, tp);
    const at::Tensor x = normal({2, length, 5}, 1);
    EXPECT_TRUE(same_bits(sequence_dropout(x.narrow(1, part.begin, part.size), 0.4, true, 9, length, tp),
                          nn::dropout(x, 0.4, true, 9).narrow(1, part.begin, part.size)));
  });
}

TEST(TensorParallelAloneTest, WithoutAGroupNothingIsAdded) {
  const at::Tensor x = normal({2, 4, 3}, 1).requires_grad_();
  for (const bool sequence_parallel : {false, true}) {
    const TensorParallel tp{nullptr, sequence_parallel};
    EXPECT_TRUE(enter_region(x, tp).is_same(x));
    EXPECT_TRUE(leave_region(x, tp).is_same(x));
    EXPECT_TRUE(scatter_sequence(x, tp).is_same(x));
    EXPECT_EQ(sequence_part(4, tp), (Part{0, 4}));
  }
}

std::string refusal(const std::function<void()>& what) {
  try {
    what();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no ConfigError";
}

TEST(TensorParallelTraceTest, ExchangesHaveSpansWithTheirBytes) {
  run_local_ranks(2, [](ProcessGroup& group) {
    metrics::Trace trace(/*capacity_events=*/16);
    trace.start();
    const TensorParallel tp{.group = &group, .sequence_parallel = true, .track = {&trace, "compute"}};
    reduce_from(normal({1, 4, 8}, 1), tp);
    gather_sequence(normal({1, 2, 8}, 2), tp);
    const std::array<std::string, 1> bytes{trace.take_bytes()};
    const std::string text = metrics::chrome_trace(bytes);
    EXPECT_THAT(text, HasSubstr("tensor-parallel sum"));
    EXPECT_THAT(text, HasSubstr("sequence-parallel gather"));
    EXPECT_THAT(text, HasSubstr("\"bytes\": 128"));
  });
}

TEST(SplitHeadsTest, GroupsOfQueryHeadsStayWithTheirKeys) {
  const auto groups = make_local_world(4);
  for (int rank = 0; rank < 4; ++rank) {
    const TensorParallel tp{groups[rank].get()};
    using Parts = std::vector<Part>;
    EXPECT_EQ(split_heads(8, 4, tp).heads, (Parts{{0, 2}, {2, 2}, {4, 2}, {6, 2}}));
    EXPECT_EQ(split_heads(12, 6, tp).heads, (Parts{{0, 4}, {4, 4}, {8, 2}, {10, 2}}));
    EXPECT_EQ(split_heads(12, 6, tp).kv_heads, (Parts{{0, 2}, {2, 2}, {4, 1}, {5, 1}}));
    EXPECT_EQ(split_heads(8, 2, tp).heads, (Parts{{0, 2}, {2, 2}, {4, 2}, {6, 2}}));
    EXPECT_EQ(split_heads(8, 2, tp).kv_heads, (Parts{{0, 1}, {0, 1}, {1, 1}, {1, 1}}));
    EXPECT_EQ(split_heads(8, 2, tp).my_kv_heads, (Part{rank / 2, 1}));
    EXPECT_THAT(refusal([&] { split_heads(6, 3, tp); }), HasSubstr("heads 6 with kv_heads 3"));
    EXPECT_THAT(refusal([&] { split_heads(6, 2, tp); }), HasSubstr("shared by 4 ranks"));
  }
}

TEST(TensorParallelRefusalTest, WhatCanNotBeCutSaysWhatCould) {
  EXPECT_THAT(refusal([] { even_parts(3, 4); }), HasSubstr("set --tensor_parallel_size=3"));
  const auto groups = make_local_world(4);
  const TensorParallel tp{groups[0].get(), /*sequence_parallel=*/true};
  EXPECT_THAT(refusal([&] { sequence_part(10, tp); }), HasSubstr("a sequence of 10 tokens"));
  EXPECT_THROW(ColumnParallelLinear(4, 8, true, tp, {{0, 8}}), CheckFailed);
  EXPECT_THROW(RowParallelLinear(8, 4, true, tp, {{0, 4}, {0, 4}, {4, 2}, {6, 2}}), CheckFailed);
}

}  // namespace
}  // namespace lockstep
