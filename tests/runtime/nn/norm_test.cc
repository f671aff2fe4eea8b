#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/norm.h>
#include <lockstep/nn/precision.h>

#include "compare.h"

namespace lockstep::nn {
namespace {

constexpr double kEpsilon = 1e-5;

// Layer norm of three or more: of one element it is 0, of two a sign, with gradients of nothing but rounding.
const std::vector<std::vector<int64_t>> kNormShapes = {{7},       {0, 7},   {1, 3},       {3, 7},
                                                       {2, 0, 5}, {17, 33}, {2, 5, 1000}, {1003, 48}};

struct Kind {
  bool rms;
  at::ScalarType input;
  bool autocast;

  bool is_bf16_out() const { return autocast || input == at::kBFloat16; }
  size_t inputs() const { return rms ? 2 : 3; }
  at::Tensor ours(const Tensors& in) const {
    const AutocastGuard guard(at::kCPU, autocast);
    return rms ? rms_norm(in[0], in[1], kEpsilon) : layer_norm(in[0], in[1], in[2], kEpsilon);
  }
  at::Tensor exact(const Tensors& in) const {
    const at::Tensor x = rms ? in[0] : in[0] - in[0].mean(-1, true);
    const at::Tensor y = x / (x.square().mean(-1, true) + kEpsilon).sqrt() * in[1];
    return rms ? y : y + in[2];
  }
  Tensors make(const std::vector<int64_t>& sizes) const {
    Tensors in = {normal(sizes, 1, input) * 2 + 0.5, normal({sizes.back()}, 2), normal({sizes.back()}, 3)};
    in.resize(inputs());
    return in;
  }
};

class NormTest : public testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, NormTest,
                         testing::Values(Kind{true, at::kFloat, false}, Kind{true, at::kBFloat16, false},
                                         Kind{true, at::kFloat, true}, Kind{true, at::kBFloat16, true},
                                         Kind{false, at::kFloat, false}, Kind{false, at::kBFloat16, false},
                                         Kind{false, at::kFloat, true}, Kind{false, at::kBFloat16, true}));

TEST_P(NormTest, AndItsGradientsAreTheFormulas) {
  const Kind kind = GetParam();
  for (const auto& sizes : kNormShapes) {
    Tensors in = kind.make(sizes);
    const auto e =
        errors([&](const Tensors& t) { return kind.ours(t); }, [&](const Tensors& t) { return kind.exact(t); }, in);
    const double rows = static_cast<double>(in[0].numel()) / static_cast<double>(sizes.back());
    EXPECT_LE(e.output, kind.is_bf16_out() ? 1.01 * kBf16 : 32 * kF32) << at::IntArrayRef(sizes);
    EXPECT_LE(e.grads[0], kind.input == at::kBFloat16 ? 1.01 * kBf16 : 64 * kF32) << at::IntArrayRef(sizes);
    for (size_t i = 1; i < in.size(); ++i)  // summed row by row in f32, whatever the type of x
      EXPECT_LE(e.grads[i], (32 + rows) * kF32) << at::IntArrayRef(sizes);
  }
}

TEST_P(NormTest, ARowsBitsDoNotDependOnTheRowsBesideIt) {
  const Kind kind = GetParam();
  const Tensors in = kind.make({19, 37});
  const at::Tensor grad = normal({19, 37}, 9);
  const auto pass = [&](int64_t begin, int64_t n) {
    Tensors part = in;
    part[0] = in[0].narrow(0, begin, n);
    return run([&](const Tensors& t) { return kind.ours(t); }, part,
               [&](const at::Tensor& y) { return grad.narrow(0, begin, n).to(y.scalar_type()); });
  };
  const Pass whole = pass(0, 19);
  for (const auto& [begin, n] : std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {3, 1}, {18, 1}, {5, 7}, {1, 18}}) {
    const Pass part = pass(begin, n);
    EXPECT_TRUE(same_bits(part.output, whole.output.narrow(0, begin, n))) << begin << " + " << n;
    EXPECT_TRUE(same_bits(part.grads[0], whole.grads[0].narrow(0, begin, n))) << begin << " + " << n;
  }
}

TEST_P(NormTest, TypesOfOutputAndGradients) {
  const Kind kind = GetParam();
  const Tensors in = kind.make({3, 5});
  const Pass pass =
      run([&](const Tensors& t) { return kind.ours(t); }, in, [](const at::Tensor& y) { return at::ones_like(y); });
  EXPECT_EQ(pass.output.scalar_type(), kind.is_bf16_out() ? at::kBFloat16 : at::kFloat);
  EXPECT_EQ(pass.grads[0].scalar_type(), kind.input);
  for (size_t i = 1; i < in.size(); ++i) EXPECT_EQ(pass.grads[i].scalar_type(), at::kFloat);
}

TEST_P(NormTest, StridesDoNotMatter) {
  const Kind kind = GetParam();
  Tensors in = kind.make({33, 6});
  Tensors strided = in;
  strided[0] = in[0].t().contiguous().t();
  const auto upstream = [](const at::Tensor& y) { return normal({6, 33}, 4).to(y.scalar_type()).t(); };
  const Formula ours = [&](const Tensors& t) { return kind.ours(t); };
  const Pass a = run(ours, strided, upstream), b = run(ours, in, upstream);
  EXPECT_TRUE(same_bits(a.output, b.output));
  for (size_t i = 0; i < in.size(); ++i) EXPECT_TRUE(same_bits(a.grads[i], b.grads[i])) << i;
}

TEST(NormAccuracyTest, InDoubleItIsLibTorchs) {
  for (const bool rms : {true, false}) {
    const Kind kind{rms, at::kDouble, false};
    Tensors in = kind.make({5, 7});
    for (auto& t : in) t = t.to(at::kDouble);
    EXPECT_LE(error_of(kind.ours(in), kind.exact(in)), 1e-14) << rms;
  }
}

TEST(NormAccuracyTest, ALargeMeanCostsOnlyItsOwnRounding) {  // E[x^2] - E[x]^2 would lose everything here
  const at::Tensor x = normal({5, 257}, 1) + 1000, ones = at::ones({257}), zeros = at::zeros({257});
  const at::Tensor wide = x.to(at::kDouble), centred = wide - wide.mean(-1, true);
  const at::Tensor exact = centred / (centred.square().mean(-1, true) + kEpsilon).sqrt();
  EXPECT_LE(error_of(layer_norm(x, ones, zeros, kEpsilon), exact), 4 * 1000 * kF32);
}

TEST(NormAccuracyTest, OneElementAndConstantRowsAreFine) {
  const at::Tensor one = at::ones({1}), x = torch::tensor({{3.0F}, {-2.0F}, {0.0F}});
  EXPECT_TRUE(at::allclose(rms_norm(x, one, 0.0625), x / (x.square() + 0.0625).sqrt(), 4 * kF32, 0));
  EXPECT_TRUE(at::equal(layer_norm(x, one, one * 7, kEpsilon), at::full({3, 1}, 7.0F)));
  EXPECT_TRUE(
      at::equal(layer_norm(at::full({2, 9}, 5.0F), at::ones({9}), at::zeros({9}), kEpsilon), at::zeros({2, 9})));
}

TEST(NormModuleTest, StartsAsTheIdentityScaleAndPassesItsEpsilonOn) {
  LayerNorm layer(7, 0.5);
  RmsNorm rms(7, 0.5);
  EXPECT_EQ(layer.named_parameters().keys(), (std::vector<std::string>{"weight", "bias"}));
  EXPECT_EQ(rms.named_parameters().keys(), std::vector<std::string>{"weight"});
  const at::Tensor x = normal({3, 7}, 1), ones = at::ones({7});
  EXPECT_TRUE(same_bits(layer.forward(x).detach(), layer_norm(x, ones, at::zeros({7}), 0.5)));
  EXPECT_TRUE(same_bits(rms.forward(x).detach(), rms_norm(x, ones, 0.5)));
  EXPECT_FALSE(at::allclose(rms.forward(x), rms_norm(x, ones, 1e-5)));
}

TEST(NormTest, ScalesThatDoNotFitAreRefused) {
  const at::Tensor x = at::ones({3, 7}), good = at::ones({7});
  for (const at::Tensor& bad : {at::ones({6}), at::ones({8}), at::ones({7}, at::kBFloat16), at::ones({7}, at::kDouble),
                                at::ones({14}).slice(0, 0, 14, 2)}) {
    EXPECT_THROW(rms_norm(x, bad, kEpsilon), CheckFailed) << bad.sizes();
    EXPECT_THROW(layer_norm(x, bad, good, kEpsilon), CheckFailed) << bad.sizes();
    EXPECT_THROW(layer_norm(x, good, bad, kEpsilon), CheckFailed) << bad.sizes();
  }
  EXPECT_THROW(rms_norm(at::ones({3, 0}), at::ones({0}), kEpsilon), CheckFailed);
  EXPECT_THROW(layer_norm(at::ones({3, 0}), at::ones({0}), at::ones({0}), kEpsilon), CheckFailed);
}

}  // namespace
}  // namespace lockstep::nn
