// Attention over a sequence that is cut, against the whole in f64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/context_parallel.h>

#include "../runtime/nn/compare.h"

namespace lockstep {
namespace {

using nn::error_of;
using nn::normal;

class ContextParallelTest : public testing::TestWithParam<int> {};  // context-parallel size
INSTANTIATE_TEST_SUITE_P(Sizes, ContextParallelTest, testing::Values(1, 2, 3, 4));

struct Shape {
  int64_t length, heads, kv_heads, dim;
};
const std::vector<Shape> kShapes = {{24, 4, 4, 8}, {48, 6, 2, 5}, {24, 3, 1, 16}, {240, 2, 1, 8}};

nn::Tensors inputs(const Shape& s) {
  return {normal({2, s.length, s.heads, s.dim}, 1), normal({2, s.length, s.kv_heads, s.dim}, 2),
          normal({2, s.length, s.kv_heads, s.dim}, 3)};
}
// Softmax spelled out.
at::Tensor exact_attention(const nn::Tensors& t, bool causal) {
  const int64_t length = t[0].size(1), group = t[0].size(2) / t[1].size(2);
  const at::Tensor q = t[0].transpose(1, 2), k = t[1].transpose(1, 2).repeat_interleave(group, 1),
                   v = t[2].transpose(1, 2).repeat_interleave(group, 1);
  at::Tensor scores = q.matmul(k.transpose(2, 3)) / std::sqrt(static_cast<double>(t[0].size(3)));
  if (causal) scores = scores.masked_fill(at::ones({length, length}, at::kBool).triu(1), -INFINITY);
  return scores.softmax(-1).matmul(v).transpose(1, 2).flatten(2);
}

void expect_exact(const Shape& s, bool causal, bool bf16, const ContextParallel& cp, const nn::Pass& exact,
                  const at::Tensor& slope) {
  nn::Tensors mine;
  for (const auto& x : inputs(s)) mine.push_back(context_slice(x, 1, cp));
  const nn::AutocastGuard precision(at::kCPU, bf16);
  const nn::Pass got = nn::run([&](const nn::Tensors& t) { return ring_attention(t[0], t[1], t[2], causal, cp); }, mine,
                               [&](const at::Tensor& y) { return context_slice(slope, 1, cp).to(y.scalar_type()); });
  const double bound = bf16 ? 0.02 : 1e-5;
  const std::string text = "T " + std::to_string(s.length) + ", heads " + std::to_string(s.heads) + "/" +
                           std::to_string(s.kv_heads) + (causal ? ", causal" : ", full") + (bf16 ? ", bf16" : "") +
                           ", rank " + std::to_string(cp.rank()) + " of " + std::to_string(cp.size());
  EXPECT_LE(error_of(got.output, context_slice(exact.output, 1, cp)), bound) << text;
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_LE(error_of(got.grads[i], context_slice(exact.grads[i], 1, cp)), bound) << "qkv"[i] << ", " << text;
    EXPECT_EQ(got.grads[i].scalar_type(), at::kFloat);
  }
  EXPECT_EQ(got.output.scalar_type(), bf16 ? at::kBFloat16 : at::kFloat);
}

TEST_P(ContextParallelTest, AttentionAndItsGradientsAreThoseOfTheWholeSequence) {
  for (const Shape& s : kShapes) {
    for (const bool causal : {false, true}) {
      const at::Tensor slope = normal({2, s.length, s.heads * s.dim}, 4);
      nn::Tensors wide;
      for (const auto& x : inputs(s)) wide.push_back(x.to(at::kDouble));
      const nn::Pass exact = nn::run([&](const nn::Tensors& t) { return exact_attention(t, causal); }, wide,
                                     [&](const at::Tensor&) { return slope.to(at::kDouble); });
      run_local_ranks(GetParam(), [&](ProcessGroup& group) {
        for (const bool bf16 : {false, true}) expect_exact(s, causal, bf16, {&group}, exact, slope);
      });
    }
  }
}

TEST_P(ContextParallelTest, LargeScoresMergeWithoutOverflow) {
  const Shape s{48, 2, 2, 4};
  nn::Tensors in = inputs(s);
  in[0] = in[0] * 300;
  const at::Tensor exact = exact_attention({in[0].to(at::kDouble), in[1].to(at::kDouble), in[2].to(at::kDouble)}, true);
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const ContextParallel cp{&group};
    const auto mine = [&](const at::Tensor& x) { return context_slice(x, 1, cp); };
    const at::Tensor y = ring_attention(mine(in[0]), mine(in[1]), mine(in[2]), true, cp);
    EXPECT_LE(error_of(y, mine(exact)), 1e-3);  // scores of a thousand carry their roundings into exponents
  });
}

TEST_P(ContextParallelTest, ChunksFromBothEndsShareTheCausalWork) {
  const int size = GetParam();
  const int64_t length = int64_t{8} * size;
  at::Tensor seen = at::zeros({length}, at::kLong);
  std::mutex mutex;
  std::vector<int64_t> scores;
  run_local_ranks(size, [&](ProcessGroup& group) {
    const at::Tensor positions = context_positions(length, {&group});
    EXPECT_EQ(positions.numel(), 8);
    EXPECT_TRUE(positions.diff().gt(0).all().item<bool>());
    const std::lock_guard lock(mutex);
    seen.index_add_(0, positions, at::ones({8}, at::kLong));
    scores.push_back(positions.add(1).sum().item<int64_t>());
  });
  EXPECT_TRUE(seen.eq(1).all().item<bool>());
  EXPECT_THAT(scores, testing::Each(scores[0]));
}

TEST(ContextParallelAloneTest, OneRankIsPlainAttention) {
  const nn::Tensors in = inputs(kShapes[1]);
  for (const bool causal : {false, true})
    EXPECT_TRUE(same_bits(ring_attention(in[0], in[1], in[2], causal, {}), nn::attention(in[0], in[1], in[2], causal)));
  EXPECT_TRUE(context_slice(in[0], 1, {}).is_same(in[0]));
}

TEST(ContextParallelRefusalTest, ALengthThatDoesNotDivideSaysWhatWould) {
  const auto groups = make_local_world(3);
  try {
    context_positions(20, {groups[1].get()});
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("20 tokens can not be cut into 6 chunks"));
  }
}

}  // namespace
}  // namespace lockstep
