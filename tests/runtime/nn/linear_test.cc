#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <lockstep/nn/linear.h>
#include <lockstep/nn/precision.h>

#include "compare.h"

namespace lockstep::nn {
namespace {

at::Tensor exact_linear(const Tensors& in) {
  const at::Tensor y = at::matmul(in[0], in[1].t());
  return in.size() == 3 ? y + in[2] : y;
}
at::Tensor our_linear(const Tensors& in) { return linear(in[0], in[1], in.size() == 3 ? in[2] : at::Tensor()); }
at::Tensor our_linear_bf16(const Tensors& in) {
  const AutocastGuard bf16(at::kCPU, true);
  return our_linear(in);
}

// x in one, two and more dims, without rows too; in and out of 1, 3, 7, 17.
const std::vector<std::vector<int64_t>> kInputs = {{3}, {1, 1}, {0, 7}, {5, 17}, {2, 3, 7}, {2, 0, 5}, {1003, 33}};

class LinearTest : public testing::TestWithParam<bool> {  // bias
 protected:
  static Tensors inputs(const std::vector<int64_t>& sizes, int64_t out) {
    Tensors in = {normal(sizes, 1), normal({out, sizes.back()}, 2)};
    if (GetParam()) in.push_back(normal({out}, 3));
    return in;
  }
};
INSTANTIATE_TEST_SUITE_P(Bias, LinearTest, testing::Bool());

TEST_P(LinearTest, IsTheFormulaInF32) {
  for (const auto& sizes : kInputs) {
    for (const int64_t out : {1, 3, 17}) {
      const auto e = errors(our_linear, exact_linear, inputs(sizes, out));
      EXPECT_LE(e.output, 32 * kF32) << at::IntArrayRef(sizes) << out;
      for (const double grad : e.grads) EXPECT_LE(grad, 64 * kF32) << at::IntArrayRef(sizes) << out;
    }
  }
}

// Some CPUs have another library for these.
TEST_P(LinearTest, LargeProductsAreTheFormulaTooWhereverTheyLie) {
  Tensors in = inputs({8, 131, 129}, 133);
  in[0] = at::cat({at::zeros({1}), in[0].flatten()}).narrow(0, 1, in[0].numel()).view(in[0].sizes());  // at odd places
  const auto e = errors(our_linear, exact_linear, in);
  EXPECT_LE(e.output, 64 * kF32);
  for (const double grad : e.grads) EXPECT_LE(grad, 64 * kF32);
  const auto upstream = [](const at::Tensor& y) { return normal(y.sizes().vec(), 6); };
  const Pass odd = run(our_linear, in, upstream);
  in[0] = in[0].clone();
  const Pass even = run(our_linear, in, upstream);
  EXPECT_TRUE(same_bits(odd.output, even.output));
  EXPECT_TRUE(same_bits(odd.grads[0], even.grads[0]));
  const Tensors strided = {normal({129, 2096}, 4).t().slice(0, 0, 2096, 2), normal({129, 133}, 5).t()};
  EXPECT_LE(errors(our_linear, exact_linear, strided).output, 64 * kF32);
}

TEST_P(LinearTest, UnderBf16RoundsOperandsAndProductsButNotSumsOfBiasGradients) {
  for (const auto& sizes : kInputs) {
    for (const int64_t out : {1, 3, 17}) {
      Tensors in = inputs(sizes, out);
      for (auto& t : in) t = t.to(at::kBFloat16).to(at::kFloat);  // so that the rounding of operands is not an error
      const auto e = errors(our_linear_bf16, exact_linear, in);
      EXPECT_LE(e.output, 2.02 * kBf16) << at::IntArrayRef(sizes) << out;
      EXPECT_LE(e.grads[0], 1.01 * kBf16) << at::IntArrayRef(sizes) << out;
      EXPECT_LE(e.grads[1], 1.01 * kBf16) << at::IntArrayRef(sizes) << out;
      if (GetParam()) {
        EXPECT_LE(e.grads[2], 64 * kF32) << at::IntArrayRef(sizes) << out;
      }
      const Pass pass = run(our_linear_bf16, in, [](const at::Tensor& y) { return at::ones_like(y); });
      EXPECT_EQ(pass.output.scalar_type(), at::kBFloat16);
      for (const auto& grad : pass.grads) EXPECT_EQ(grad.scalar_type(), at::kFloat);
    }
  }
}

TEST_P(LinearTest, StridesDoNotMatter) {
  for (const Formula& formula : {Formula(our_linear), Formula(our_linear_bf16)}) {
    Tensors strided = inputs({6, 5}, 7), dense;
    strided[0] = normal({5, 12}, 4).t().slice(0, 0, 12, 2);
    strided[1] = normal({5, 7}, 5).t();
    for (const auto& t : strided) dense.push_back(t.contiguous());
    const auto upstream = [](const at::Tensor& y) { return normal({7, 6}, 6).to(y.scalar_type()).t(); };
    const Pass a = run(formula, strided, upstream), b = run(formula, dense, upstream);
    const double limit = a.output.scalar_type() == at::kFloat ? 16 * kF32 : 2.02 * kBf16;
    EXPECT_LE(error_of(a.output, b.output), limit);
    for (size_t i = 0; i < a.grads.size(); ++i) EXPECT_LE(error_of(a.grads[i], b.grads[i]), limit) << i;
  }
}

TEST(Bf16LinearTest, ABiasGradientCountsEveryRow) {  // 256 + 1 is 256 in bf16
  const Tensors in = {at::ones({4099, 2}), at::ones({3, 2}), at::zeros({3})};
  const Pass pass = run(our_linear_bf16, in, [](const at::Tensor& y) { return at::ones_like(y); });
  EXPECT_TRUE(at::equal(pass.grads[2], at::full({3}, 4099.0F)));
}

TEST(Bf16LinearTest, AWeightUsedTwiceSumsItsGradientsInF32) {
  const at::Tensor a = normal({9, 5}, 1), b = normal({7, 5}, 2) * 1e-3, w = normal({3, 5}, 3);
  const auto ones = [](const at::Tensor& y) { return at::ones_like(y); };
  const auto use = [&](const at::Tensor& x) {
    return run([&](const Tensors& in) { return our_linear_bf16({x, in[0]}).sum(at::kFloat); }, {w}, ones).grads[0];
  };
  const Pass both = run(
      [&](const Tensors& in) {
        const AutocastGuard bf16(at::kCPU, true);
        return linear(a, in[0], at::Tensor()).sum(at::kFloat) + linear(b, in[0], at::Tensor()).sum(at::kFloat);
      },
      {w}, ones);
  EXPECT_TRUE(same_bits(both.grads[0], use(a) + use(b)));
}

TEST(Bf16LinearTest, OnlyWhatNeedsAGradientGetsOne) {
  for (int needs = 1; needs < 8; ++needs) {
    Tensors in = {normal({3, 5}, 1), normal({7, 5}, 2), normal({7}, 3)};
    for (size_t i = 0; i < 3; ++i) in[i].requires_grad_((needs >> i & 1) != 0);
    our_linear_bf16(in).sum().backward();
    for (size_t i = 0; i < 3; ++i) EXPECT_EQ(in[i].grad().defined(), (needs >> i & 1) != 0) << needs << " " << i;
  }
}

TEST(LinearModuleTest, RegistersItsParametersUnderTheirNames) {
  Linear with(3, 5), without(3, 5, /*bias=*/false);
  EXPECT_EQ(with.named_parameters().keys(), (std::vector<std::string>{"weight", "bias"}));
  EXPECT_EQ(without.named_parameters().keys(), std::vector<std::string>{"weight"});
  EXPECT_EQ(with.weight.sizes(), at::IntArrayRef({5, 3}));
  EXPECT_EQ(with.bias.sizes(), at::IntArrayRef({5}));
  EXPECT_FALSE(without.bias.defined());
  at::NoGradGuard no_grad;
  with.weight.copy_(normal({5, 3}, 1)), with.bias.copy_(normal({5}, 2)), without.weight.copy_(with.weight);
  const at::Tensor x = normal({4, 3}, 3);
  EXPECT_LE(error_of(with.forward(x), exact_linear({x, with.weight, with.bias})), 8 * kF32);
  EXPECT_LE(error_of(without.forward(x), exact_linear({x, with.weight})), 8 * kF32);
}

TEST(EmbeddingTest, LooksRowsUpAndSumsGradientsInOrderOfPosition) {
  at::set_num_threads(1);
  constexpr int64_t kVocab = 7, kDim = 5, kPositions = 1003;
  Embedding embedding(kVocab, kDim);
  EXPECT_EQ(embedding.named_parameters().keys(), std::vector<std::string>{"weight"});
  embedding.weight.detach().copy_(normal({kVocab, kDim}, 1));
  const at::Tensor ids = (at::arange(kPositions) * at::arange(kPositions) + 3) % (kVocab - 1);  // the last is unused
  const at::Tensor rows = embedding.forward(ids), grad = normal({kPositions, kDim}, 2);
  std::vector<float> sums(kVocab * kDim);
  for (int64_t i = 0; i < kPositions; ++i) {
    const auto id = ids[i].item<int64_t>();
    ASSERT_TRUE(same_bits(rows[i].detach(), embedding.weight[id].detach()));
    for (int64_t j = 0; j < kDim; ++j) sums[id * kDim + j] += grad.const_data_ptr<float>()[i * kDim + j];
  }
  rows.backward(grad);
  EXPECT_EQ(std::memcmp(embedding.weight.grad().const_data_ptr<float>(), sums.data(), sums.size() * sizeof(float)), 0);
  EXPECT_EQ(embedding.forward(at::zeros({2, 0}, at::kLong)).sizes(), at::IntArrayRef({2, 0, kDim}));
}

}  // namespace
}  // namespace lockstep::nn
