// gelu, swiglu, rope.
#include <cmath>
#include <numbers>

#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/functions.h>

#include "compare.h"

namespace lockstep::nn {
namespace {

const std::vector<std::vector<int64_t>> kElementShapes = {{}, {0}, {1}, {3, 7}, {2, 0, 5}, {17, 33}, {1'000'003}};

// Some roundings, more where the exponential's argument is large; bf16 rounds the result once more, and that is nearly
// all of its error.
double tolerance(at::ScalarType type) {
  return type == at::kDouble ? 1e-14 : type == at::kFloat ? 32 * kF32 : 1.01 * kBf16;
}

at::Tensor exact_gelu(const Tensors& in) {
  const at::Tensor& x = in[0];
  return 0.5 * x * (1 + at::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x.pow(3))));
}
at::Tensor exact_swiglu(const Tensors& in) { return in[0] / (1 + at::exp(-in[0])) * in[1]; }

class ElementwiseTest : public testing::TestWithParam<at::ScalarType> {
 protected:
  at::ScalarType type = GetParam();
};
INSTANTIATE_TEST_SUITE_P(Types, ElementwiseTest, testing::Values(at::kFloat, at::kBFloat16, at::kDouble),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

TEST_P(ElementwiseTest, GeluAndItsGradientAreTheFormulas) {
  for (const auto& shape : kElementShapes) {
    const auto e = errors([](const Tensors& in) { return nn::gelu(in[0]); }, exact_gelu, {normal(shape, 1, type) * 3});
    EXPECT_LE(e.output, tolerance(type)) << at::IntArrayRef(shape);
    EXPECT_LE(e.grads[0], tolerance(type)) << at::IntArrayRef(shape);
  }
}

TEST_P(ElementwiseTest, SwigluAndItsGradientsAreTheFormulas) {
  for (const auto& shape : kElementShapes) {
    const auto e = errors([](const Tensors& in) { return swiglu(in[0], in[1]); }, exact_swiglu,
                          {normal(shape, 1, type) * 3, normal(shape, 2, type)});
    EXPECT_LE(e.output, tolerance(type)) << at::IntArrayRef(shape);
    EXPECT_LE(e.grads[0], tolerance(type)) << at::IntArrayRef(shape);
    EXPECT_LE(e.grads[1], tolerance(type)) << at::IntArrayRef(shape);
  }
}

class StridesTest : public ElementwiseTest {};
INSTANTIATE_TEST_SUITE_P(Types, StridesTest, testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

TEST_P(StridesTest, DoNotMatter) {
  const at::Tensor x = normal({17, 34}, 1, type), up = normal({34, 17}, 2, type);
  const auto upstream = [](const at::Tensor& y) { return normal({y.size(1), y.size(0)}, 3).to(y.scalar_type()).t(); };
  const std::vector<at::Tensor> views = {x.t(), x.t().narrow(0, 1, 33), x.narrow(1, 0, 1).expand({17, 5}),
                                         x.slice(1, 1, 34, 3)};
  for (const at::Tensor& view : views) {
    const at::Tensor copy = view.contiguous(), u = up.view(-1).narrow(0, 0, view.numel()).view({view.size(1), -1}).t();
    const Formula g = [](const Tensors& in) { return nn::gelu(in[0]); };
    const Formula s = [](const Tensors& in) { return swiglu(in[0], in[1]); };
    const Pass a = run(g, {view}, upstream), b = run(g, {copy}, upstream);
    EXPECT_TRUE(same_bits(a.output, b.output) && same_bits(a.grads[0], b.grads[0])) << view.sizes() << view.strides();
    const Pass c = run(s, {view, u}, upstream), d = run(s, {copy, u.contiguous()}, upstream);
    EXPECT_TRUE(same_bits(c.output, d.output) && same_bits(c.grads[0], d.grads[0]) && same_bits(c.grads[1], d.grads[1]))
        << view.sizes() << view.strides();
  }
}

// LibTorch's differ between the body and the tail of a vector loop.
TEST(ElementwiseBitsTest, AnElementsBitsDoNotDependOnWhereItStands) {
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    constexpr int64_t kElements = 1003;
    const at::Tensor x = normal({kElements}, 1, type), u = normal({kElements}, 2, type),
                     g = normal({kElements}, 3, type);
    const Formula formulas[] = {[](const Tensors& in) { return nn::gelu(in[0]) + 0 * in[1]; },
                                [](const Tensors& in) { return swiglu(in[0], in[1]); }};
    for (const Formula& formula : formulas) {
      const Pass whole = run(formula, {x, u}, [&](const at::Tensor&) { return g.view(-1); });
      for (const int64_t begin : {0, 1, 5, 31, 500}) {
        for (const int64_t n : {1, 3, 15, 16, 17, 33, 503}) {
          const Pass part = run(formula, {x.narrow(0, begin, n), u.narrow(0, begin, n)},
                                [&](const at::Tensor&) { return g.narrow(0, begin, n); });
          EXPECT_TRUE(same_bits(part.output, whole.output.narrow(0, begin, n)) &&
                      same_bits(part.grads[0], whole.grads[0].narrow(0, begin, n)) &&
                      same_bits(part.grads[1], whole.grads[1].narrow(0, begin, n)))
              << type << " " << begin << " + " << n;
        }
      }
    }
  }
}

// The exponential inside is good to an ulp or so; e^u of a rounded u is off by |u| roundings more.
TEST(ElementwiseAccuracyTest, SiluIsGoodToAFewUlpsAtEveryMagnitude) {
  const at::Tensor x = at::cat({at::linspace(-86, 86, 200'003), normal({1003}, 5) * 1e-3, normal({1003}, 6) * 1e-30});
  const at::Tensor exact = x.to(at::kDouble) / (1 + at::exp(-x.to(at::kDouble)));
  const at::Tensor ulps = ((swiglu(x, at::ones_like(x)) - exact) / exact).abs() / kF32;
  EXPECT_LE(ulps.max().item<double>(), 8);
}

TEST(ElementwiseAccuracyTest, ExtremesSaturateAndNansStay) {
  const at::Tensor x = torch::tensor({-1e30F, -1e4F, -200.0F, 200.0F, 1e4F}).requires_grad_();
  const at::Tensor y = nn::gelu(x), s = swiglu(x, at::ones({5}));
  for (const auto& out : {y, s}) {
    EXPECT_TRUE(at::allclose(out.slice(0, 1), torch::tensor({0.0F, 0.0F, 200.0F, 1e4F}), 0, 1e-30));
    EXPECT_TRUE(out.isfinite().slice(0, 1).all().item<bool>());
  }
  const at::Tensor slope = torch::autograd::grad({s.sum()}, {x})[0];
  EXPECT_TRUE(at::allclose(slope.slice(0, 1), torch::tensor({0.0F, 0.0F, 1.0F, 1.0F}), 0, 1e-30));
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor nan = at::full({3}, NAN, type);
    EXPECT_TRUE(nn::gelu(nan).isnan().all().item<bool>());
    EXPECT_TRUE(swiglu(nan, at::ones_like(nan)).isnan().all().item<bool>());
  }
}

TEST(SwigluTest, UnlikePairsAreRefused) {
  EXPECT_THROW(swiglu(at::ones({3, 4}), at::ones({4, 3})), CheckFailed);
  EXPECT_THROW(swiglu(at::ones({3, 4}), at::ones({3})), CheckFailed);
  EXPECT_THROW(swiglu(at::ones({3, 4}), at::ones({3, 4}, at::kBFloat16)), CheckFailed);
}

at::Tensor exact_rope(const at::Tensor& x, double theta) {
  const int64_t half = x.size(3) / 2;
  const at::Tensor angles = at::arange(x.size(1), at::kDouble).view({1, -1, 1, 1}) *
                            at::pow(theta, -at::arange(half, at::kDouble) / static_cast<double>(half));
  const at::Tensor a = x.narrow(3, 0, half), b = x.narrow(3, half, half);
  return at::cat({a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()}, 3);
}

TEST_P(ElementwiseTest, RopeTurnsPairsOfHalvesByPositionTimesFrequency) {
  struct Case {
    std::vector<int64_t> shape;
    double theta;
  };
  for (const Case& c : {Case{{1, 1, 1, 2}, 1e4}, Case{{3, 7, 2, 6}, 1e4}, Case{{2, 17, 3, 34}, 5e5},
                        Case{{1, 513, 1, 64}, 1e4}, Case{{0, 3, 2, 4}, 1e4}, Case{{2, 0, 2, 4}, 1e4}}) {
    const auto tables = rope_tables(c.shape[1], c.shape[3], c.theta);
    const auto e = errors([&](const Tensors& in) { return rope(in[0], tables.first, tables.second); },
                          [&](const Tensors& in) { return exact_rope(in[0], c.theta); }, {normal(c.shape, 1, type)});
    const double limit = type == at::kDouble ? 4 * kF32 : tolerance(type);  // the tables are f32
    EXPECT_LE(e.output, limit) << at::IntArrayRef(c.shape);
    EXPECT_LE(e.grads[0], limit) << at::IntArrayRef(c.shape);
  }
}

TEST(RopeTest, TablesAreRoundedOnceFromDouble) {
  const auto [cosines, sines] = rope_tables(2049, 10, 1e4);
  ASSERT_EQ(cosines.sizes(), at::IntArrayRef({2049, 5}));
  for (const int64_t t : {0, 1, 2, 1000, 2048}) {
    for (int64_t i = 0; i < 5; ++i) {
      const double angle = static_cast<double>(t) * std::pow(1e4, -static_cast<double>(i) / 5);
      EXPECT_NEAR(cosines[t][i].item<double>(), std::cos(angle), 1.01 * kF32) << t << " " << i;
      EXPECT_NEAR(sines[t][i].item<double>(), std::sin(angle), 1.01 * kF32) << t << " " << i;
    }
  }
  const auto [shorter, unused] = rope_tables(3, 10, 1e4);
  EXPECT_TRUE(same_bits(shorter, cosines.narrow(0, 0, 3))) << "a position's row depends on its length";
}

TEST(RopeTest, TakesViewsOfPackedProjections) {
  const at::Tensor packed = normal({2, 5, 9, 8}, 1), x = packed.narrow(2, 3, 4);
  const auto [cosines, sines] = rope_tables(5, 8, 1e4);
  EXPECT_TRUE(same_bits(rope(x, cosines, sines), rope(x.contiguous(), cosines, sines)));
}

TEST(RopeTest, TablesThatDoNotFitAreRefused) {
  const at::Tensor x = at::ones({2, 5, 3, 8});
  const auto [c, s] = rope_tables(5, 8, 1e4);
  EXPECT_NO_THROW(rope(x, c, s));
  EXPECT_THROW(rope(x, c.narrow(0, 0, 4), s), CheckFailed);
  EXPECT_THROW(rope(x, c, s.narrow(1, 0, 3)), CheckFailed);
  EXPECT_THROW(rope(x, c.to(at::kDouble), s), CheckFailed);
  EXPECT_THROW(rope(at::ones({2, 5, 3, 7}), c, s), CheckFailed) << "an odd D has an element without a partner";
  EXPECT_THROW(rope(x, c.t().contiguous().t(), s), CheckFailed);
}

}  // namespace
}  // namespace lockstep::nn
