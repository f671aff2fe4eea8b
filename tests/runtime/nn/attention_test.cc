#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include <lockstep/nn/functions.h>

#include "compare.h"

namespace lockstep::nn {
namespace {

struct Shape {
  int64_t batch, length, heads, kv_heads, dim;
};
const std::vector<Shape> kShapes = {{1, 1, 1, 1, 1},  {3, 7, 4, 4, 8},    {2, 17, 6, 2, 5},
                                    {1, 33, 4, 1, 3}, {2, 130, 3, 3, 16}, {0, 3, 2, 1, 4}};

// softmax(q k^T / sqrt(D)) v, spelled out.
at::Tensor exact_attention(const Tensors& in, bool causal) {
  const int64_t length = in[0].size(1), group = in[0].size(2) / in[1].size(2);
  const auto by_head = [&](const at::Tensor& x, int64_t times) {
    return x.repeat_interleave(times, 2).transpose(1, 2);
  };
  const at::Tensor q = by_head(in[0], 1), k = by_head(in[1], group), v = by_head(in[2], group);
  at::Tensor scores = at::matmul(q, k.transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)));
  if (causal)
    scores =
        scores.masked_fill(at::ones({length, length}, at::kBool).triu(1), -std::numeric_limits<double>::infinity());
  return at::matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2);
}

Tensors inputs(const Shape& s, at::ScalarType type) {
  return {normal({s.batch, s.length, s.heads, s.dim}, 1, type), normal({s.batch, s.length, s.kv_heads, s.dim}, 2, type),
          normal({s.batch, s.length, s.kv_heads, s.dim}, 3, type)};
}

class AttentionTest : public testing::TestWithParam<bool> {};  // causal
INSTANTIATE_TEST_SUITE_P(Causal, AttentionTest, testing::Bool());

TEST_P(AttentionTest, IsTheFormulaWithOneOrFewerKeyHeadsThanHeads) {
  for (const auto& shape : kShapes) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      const auto e = errors([](const Tensors& in) { return attention(in[0], in[1], in[2], GetParam()); },
                            [](const Tensors& in) { return exact_attention(in, GetParam()); }, inputs(shape, type));
      // Sums of up to 130 products in f32; bf16 also rounds probabilities, and gradients of k, v are sums over them.
      const double limit = type == at::kFloat ? 64 * kF32 : 4 * kBf16;
      EXPECT_LE(e.output, limit) << shape.length << " " << type;
      for (const double grad : e.grads) {
        // One token attends to itself alone: the gradients of q and k are 0 but for rounding.
        EXPECT_LE(grad, limit) << shape.length << " " << type;
      }
    }
  }
}

TEST_P(AttentionTest, TakesViewsOfAPackedProjection) {
  const at::Tensor packed = normal({2, 9, 8, 5}, 4);
  const auto parts = packed.split_with_sizes({4, 2, 2}, 2);
  const at::Tensor a = attention(parts[0], parts[1], parts[2], GetParam());
  const at::Tensor b = attention(parts[0].contiguous(), parts[1].contiguous(), parts[2].contiguous(), GetParam());
  EXPECT_LE(error_of(a, b), 8 * kF32);
  EXPECT_EQ(a.sizes(), at::IntArrayRef({2, 9, 20}));
}

TEST(CausalAttentionTest, WhatComesLaterChangesNothingBefore) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const Tensors in = inputs({2, 17, 6, 2, 5}, type);
    Tensors other;
    for (const auto& x : in) {
      other.push_back(x.clone());
      other.back().narrow(1, 9, 8).add_(3.0);
    }
    const at::Tensor a = attention(in[0], in[1], in[2], true), b = attention(other[0], other[1], other[2], true);
    EXPECT_TRUE(same_bits(a.narrow(1, 0, 9), b.narrow(1, 0, 9))) << type;
    EXPECT_FALSE(at::equal(a.narrow(1, 9, 8), b.narrow(1, 9, 8))) << type;
  }
}

}  // namespace
}  // namespace lockstep::nn
