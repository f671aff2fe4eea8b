#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <lockstep/nn/functions.h>
#include <lockstep/nn/precision.h>

#include "attention_kernel.h"
#include "compare.h"

namespace lockstep::nn {
namespace {

struct Shape {
  int64_t batch, length, heads, kv_heads, dim;
};
const std::vector<Shape> kShapes = {{1, 1, 1, 1, 1},  {3, 7, 4, 4, 8},    {2, 17, 6, 2, 5},
                                    {1, 33, 4, 1, 3}, {2, 130, 3, 3, 16}, {0, 3, 2, 1, 4}};

// As the kernel says it, and not as LibTorch does.
bool cpu_has(const std::string& feature) {
  std::ifstream file("/proc/cpuinfo");
  const std::string text(std::istreambuf_iterator<char>(file), {});
  return text.find(" " + feature + " ") != std::string::npos;
}

// softmax(q k^T / sqrt(D)) v, spelled out.
at::Tensor exact_attention(const Tensors& in, bool causal) {
  const int64_t group = in[0].size(2) / in[1].size(2);
  const auto by_head = [&](const at::Tensor& x, int64_t times) {
    return x.repeat_interleave(times, 2).transpose(1, 2);
  };
  const at::Tensor q = by_head(in[0], 1), k = by_head(in[1], group), v = by_head(in[2], group);
  at::Tensor scores = at::matmul(q, k.transpose(2, 3)) / std::sqrt(static_cast<double>(q.size(3)));
  if (causal) {
    const at::Tensor later = at::ones({in[0].size(1), in[1].size(1)}, at::kBool).triu(1);
    scores = scores.masked_fill(later, -std::numeric_limits<double>::infinity());
  }
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
  for (const auto& [type, dim] :
       {std::pair<at::ScalarType, int64_t>{at::kFloat, 5}, {at::kFloat, 16}, {at::kBFloat16, 5}}) {
    const Tensors in = inputs({2, 17, 6, 2, dim}, type);
    Tensors other;
    for (const auto& x : in) {
      other.push_back(x.clone());
      other.back().narrow(1, 9, 8).add_(3.0);
    }
    other[2].narrow(1, 9, 8).mul_(1e37);  // times a probability that is small and not 0, this would be seen
    const at::Tensor a = attention(in[0], in[1], in[2], true), b = attention(other[0], other[1], other[2], true);
    EXPECT_TRUE(same_bits(a.narrow(1, 0, 9), b.narrow(1, 0, 9))) << type << " " << dim;
    EXPECT_FALSE(at::equal(a.narrow(1, 9, 8), b.narrow(1, 9, 8))) << type << " " << dim;
  }
}

// What follows is about the kernel of ours for f32, whose blocks have 64 queries, tiles 256 keys and vectors 16 lanes.
constexpr double kTiled = 1e-5;  // sums of up to 1024 products in f32, relative to the largest element

Pass pass(const Tensors& in, bool causal) {
  return run([&](const Tensors& t) { return attention(t[0], t[1], t[2], causal); }, in,
             [](const at::Tensor& out) { return normal(out.sizes(), 77); });
}

void expect_formula(const Tensors& in, bool causal, double limit = kTiled) {
  const auto e = errors([&](const Tensors& t) { return attention(t[0], t[1], t[2], causal); },
                        [&](const Tensors& t) { return exact_attention(t, causal); }, in);
  EXPECT_LE(e.output, limit) << in[0].sizes() << in[1].sizes();
  for (const double grad : e.grads) EXPECT_LE(grad, limit) << in[0].sizes() << in[1].sizes();
}

void expect_same_bits(const Pass& a, const Pass& b) {
  EXPECT_TRUE(same_bits(a.output, b.output));
  for (size_t i = 0; i < a.grads.size(); ++i) EXPECT_TRUE(same_bits(a.grads[i], b.grads[i])) << "qkv"[i];
}

class TiledAttentionTest : public testing::TestWithParam<bool> {  // causal
  void SetUp() override {
    if (!has_attention_kernel(16)) GTEST_SKIP() << "needs AVX-512";
  }
};
INSTANTIATE_TEST_SUITE_P(Causal, TiledAttentionTest, testing::Bool());

TEST_P(TiledAttentionTest, ServesF32AndBf16WithHeadsOf16To256) {
  const auto is_ours = [](int64_t dim, at::ScalarType type) {
    const at::Tensor x = normal({1, 2, 1, dim}, 1, type).requires_grad_();
    return attention(x, x, x, GetParam()).grad_fn()->name().find("lockstep") != std::string::npos;
  };
  for (const int64_t dim : {16, 48, 64, 256}) EXPECT_TRUE(is_ours(dim, at::kFloat)) << dim;
  for (const int64_t dim : {8, 24, 272}) EXPECT_FALSE(is_ours(dim, at::kFloat)) << dim;
  EXPECT_FALSE(is_ours(64, at::kDouble));
  EXPECT_EQ(is_ours(64, at::kBFloat16), !cpu_has("amx_bf16"));
  const AutocastGuard bf16(at::kCPU, true);
  EXPECT_FALSE(is_ours(64, at::kFloat));
}

#if defined(__x86_64__)
TEST(HasAttentionKernelTest, WhereTheCpuHasAvx512) {
  EXPECT_EQ(has_attention_kernel(64),
            __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512vl") != 0);
}
#endif

TEST_P(AttentionTest, IsTheFormulaWhereverBlocksAndTilesEnd) {
  const std::vector<Shape> shapes = {{1, 7, 3, 3, 32},   {3, 33, 8, 1, 16},   {2, 63, 2, 2, 48},
                                     {1, 64, 1, 1, 64},  {1, 130, 2, 2, 256}, {1, 255, 4, 2, 64},
                                     {2, 257, 6, 2, 64}, {1, 600, 3, 1, 80},  {1, 1024, 2, 1, 64}};
  for (const auto& shape : shapes) expect_formula(inputs(shape, at::kFloat), GetParam());
}

TEST_P(TiledAttentionTest, OneTokenAttendsToItself) {
  const Tensors in = inputs({2, 1, 4, 2, 16}, at::kFloat);
  const Pass p = pass(in, GetParam());
  EXPECT_TRUE(same_bits(p.output, in[2].repeat_interleave(2, 2).flatten(2)));
  for (const int i : {0, 1}) EXPECT_LE(p.grads[i].abs().max().item<double>(), kTiled) << "qk"[i];
}

TEST_P(AttentionTest, TakesAnotherNumberOfKeysThanQueries) {
  for (const auto& [queries, keys] : {std::pair<int64_t, int64_t>{70, 300}, {300, 70}, {3, 257}, {600, 259}, {5, 600}})
    expect_formula({normal({2, queries, 4, 32}, 1), normal({2, keys, 2, 32}, 2), normal({2, keys, 2, 32}, 3)},
                   GetParam());
}

TEST(CausalAttentionTest, KeysThatNoQuerySeesGetNoGradient) {
  const Tensors in = {normal({1, 70, 2, 64}, 1), normal({1, 300, 2, 64}, 2), normal({1, 300, 2, 64}, 3)};
  for (int i = 0; i < 8; ++i) at::full({1, 300, 2, 64}, 5.0);  // the memory that gradients may get
  const Pass p = pass(in, true);
  for (const int i : {1, 2}) EXPECT_TRUE(p.grads[i].narrow(1, 70, 230).eq(0).all().item<bool>()) << "qkv"[i];
}

TEST_P(TiledAttentionTest, ReadsStridedRowsAndGivesTheBitsOfDenseOnes) {
  const at::Tensor packed = normal({2, 77, 389}, 4).narrow(2, 3, 384).unflatten(2, {8, 48});
  const auto parts = packed.split_with_sizes({4, 2, 2}, 2);
  ASSERT_FALSE(parts[0].is_contiguous());
  const Tensors dense = {parts[0].contiguous(), parts[1].contiguous(), parts[2].contiguous()};
  const Pass expected = pass(dense, GetParam());
  expect_same_bits(pass({parts[0], parts[1], parts[2]}, GetParam()), expected);
  Tensors turned;  // rows that are not dense
  for (const auto& x : dense) turned.push_back(x.transpose(1, 3).contiguous().transpose(1, 3));
  ASSERT_NE(turned[0].stride(3), 1);
  expect_same_bits(pass(turned, GetParam()), expected);
}

TEST_P(TiledAttentionTest, TakesAnyStridesOfTheGradient) {
  const Tensors in = inputs({2, 20, 2, 2, 16}, at::kFloat);
  const auto grads_of = [&](const at::Tensor& upstream) {
    return run([](const Tensors& t) { return attention(t[0], t[1], t[2], GetParam()); }, in,
               [&](const at::Tensor&) { return upstream; });
  };
  const at::Tensor one = at::ones({}), upstream = normal({20, 32, 2}, 5).permute({2, 0, 1});
  expect_same_bits(grads_of(one.expand({2, 20, 32})), grads_of(at::ones({2, 20, 32})));
  expect_same_bits(grads_of(upstream), grads_of(upstream.contiguous()));
}

TEST_P(AttentionTest, LargeScoresNeitherOverflowNorLoseTheirPlace) {
  const int64_t length = 600;
  const at::Tensor ramp = at::arange(length, at::kFloat).div(length).view({1, length, 1, 1});
  for (const bool rising : {false, true}) {  // the largest score moves from tile to tile, or is in the first
    Tensors in = inputs({1, length, 2, 2, 32}, at::kFloat);
    in[0] = in[0].abs();
    in[1] = in[1].mul(0.1).add(rising ? ramp : 1 - ramp).mul(20.0);
    // A rounding of a score of about 100 is 2^-18 of its exponential.
    expect_formula(in, GetParam(), 2e-4);
    in[1] = in[1].mul(1000.0);  // now probabilities are 0 or 1
    for (const auto& grad : pass(in, GetParam()).grads) EXPECT_TRUE(grad.isfinite().all().item<bool>());
  }
}

TEST_P(TiledAttentionTest, ASampleHasTheSameBitsAloneAndInABatch) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const Tensors in = inputs({3, 257, 4, 2, 64}, type);
    const at::Tensor upstream = normal({3, 257, 256}, 77, type);
    const auto part = [&](int64_t begin, int64_t size) {
      Tensors some;
      for (const auto& x : in) some.push_back(x.narrow(0, begin, size));
      return run([](const Tensors& t) { return attention(t[0], t[1], t[2], GetParam()); }, some,
                 [&](const at::Tensor&) { return upstream.narrow(0, begin, size); });
    };
    const Pass all = part(0, 3), last = part(2, 1);
    Pass last_of_all{all.output.narrow(0, 2, 1), {}};
    for (const auto& grad : all.grads) last_of_all.grads.push_back(grad.narrow(0, 2, 1));
    expect_same_bits(last_of_all, last);
  }
}

TEST_P(TiledAttentionTest, GivesTheSameBitsOnOneAndTwoThreads) {
  const int threads = at::get_num_threads();
  const Tensors in = inputs({2, 130, 6, 3, 64}, at::kFloat);
  at::set_num_threads(1);
  const Pass one = pass(in, GetParam());
  at::set_num_threads(2);
  const Pass two = pass(in, GetParam());
  at::set_num_threads(threads);
  expect_same_bits(one, two);
}

}  // namespace
}  // namespace lockstep::nn
