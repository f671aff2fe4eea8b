#include <cmath>

#include <ATen/record_function.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/precision.h>

#include "compare.h"

namespace lockstep::nn {
namespace {

struct LogitShape {
  int64_t rows, width, vocab;
};
// Chunks of rows are 2 MiB of logits: 10 rows of 50257 f32 or 20 of bf16, 127 of 4099, none of which divides the rows.
const std::vector<LogitShape> kLogitShapes = {{1, 1, 1},       {0, 5, 11},      {3, 7, 17},
                                              {1, 3, 600'000}, {47, 3, 50'257}, {1003, 8, 4099}};

enum class Ignored { kNone, kSome, kAll };

at::Tensor targets(const LogitShape& s, Ignored ignored) {
  at::Tensor ids = at::empty({s.rows}, at::kLong);
  for (int64_t i = 0; i < s.rows; ++i)
    ids[i] = ignored == Ignored::kAll || (ignored == Ignored::kSome && i % 3 == 1) ? kIgnore : (i * 7919 + 1) % s.vocab;
  return ids;
}

at::Tensor exact_loss(const at::Tensor& logits, const at::Tensor& ids) {
  at::Tensor loss = at::zeros({}, logits.options());
  const at::Tensor counted = ids.ne(kIgnore).nonzero().view(-1), rows = logits.index_select(0, counted);
  return (rows.logsumexp(1) - rows.gather(1, ids.index_select(0, counted).unsqueeze(1)).squeeze(1)).sum();
}

at::Tensor seven_tenths(const at::Tensor& loss) { return at::full({}, 0.7F, loss.options()); }

class LossTest : public testing::TestWithParam<Ignored> {};
INSTANTIATE_TEST_SUITE_P(Ignored, LossTest, testing::Values(Ignored::kNone, Ignored::kSome, Ignored::kAll));

TEST_P(LossTest, OfAProductIsTheFormulaWhateverTheChunks) {
  for (const auto& s : kLogitShapes) {
    const at::Tensor ids = targets(s, GetParam());
    const Tensors in = {normal({s.rows, s.width}, 1), normal({s.vocab, s.width}, 2)};
    const Pass ours =
        run([&](const Tensors& t) { return linear_cross_entropy_sum(t[0], t[1], ids); }, in, seven_tenths);
    const Pass exact = run([&](const Tensors& t) { return exact_loss(at::mm(t[0], t[1].t()), ids); },
                           {in[0].to(at::kDouble), in[1].to(at::kDouble)}, seven_tenths);
    // A sum over the vocabulary runs in 32 lanes, so some hundred additions; logits up to 15 carry 15 roundings.
    EXPECT_LE(error_of(ours.output, exact.output), 64 * kF32) << s.rows << " x " << s.vocab;
    // LibTorch's product with so few columns sums over the vocabulary one by one.
    EXPECT_LE(error_of(ours.grads[0], exact.grads[0]), (512 + static_cast<double>(s.vocab) / 8) * kF32)
        << s.rows << " x " << s.vocab;
    EXPECT_LE(error_of(ours.grads[1], exact.grads[1]), 512 * kF32) << s.rows << " x " << s.vocab;
    EXPECT_EQ(ours.output.scalar_type(), at::kFloat);
  }
}

TEST_P(LossTest, OfLogitsIsTheFormula) {
  for (const auto& s : kLogitShapes) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      const at::Tensor ids = targets(s, GetParam()), logits = normal({s.rows, s.vocab}, 1, type) * 4;
      const Pass ours = run([&](const Tensors& t) { return cross_entropy_sum(t[0], ids); }, {logits}, seven_tenths);
      const Pass exact =
          run([&](const Tensors& t) { return exact_loss(t[0], ids); }, {logits.to(at::kDouble)}, seven_tenths);
      EXPECT_LE(error_of(ours.output, exact.output), 64 * kF32) << type << s.rows << " x " << s.vocab;
      EXPECT_LE(error_of(ours.grads[0], exact.grads[0]), type == at::kFloat ? 512 * kF32 : 2.02 * kBf16)
          << type << s.rows << " x " << s.vocab;
    }
  }
}

TEST_P(LossTest, InBf16RoundsInputsAndLogitsOnly) {
  for (const auto& s : kLogitShapes) {
    const at::Tensor ids = targets(s, GetParam()), x = normal({s.rows, s.width}, 1), w = normal({s.vocab, s.width}, 2);
    const auto round = [](const at::Tensor& t) { return t.to(at::kBFloat16).to(t.scalar_type()); };
    const Formula ours = [&](const Tensors& t) {
      const AutocastGuard bf16(at::kCPU, true);
      return linear_cross_entropy_sum(t[0], t[1], ids);
    };
    const Pass got = run(ours, {x, w}, seven_tenths);
    const Pass exact = run([&](const Tensors& t) { return exact_loss(at::mm(t[0], t[1].t()), ids); },
                           {round(x).to(at::kDouble), round(w).to(at::kDouble)}, seven_tenths);
    EXPECT_EQ(got.grads[0].scalar_type(), at::kFloat);
    EXPECT_EQ(got.grads[1].scalar_type(), at::kFloat);
    // Logits reach 16, so each is off by up to 16 roundings of bf16, half of that typical for the largest; gradients
    // are probabilities, off by e to that.
    EXPECT_LE(error_of(got.output, exact.output), 4 * kBf16) << s.rows << " x " << s.vocab;
    EXPECT_LE(error_of(got.grads[0], exact.grads[0]), 16 * kBf16) << s.rows << " x " << s.vocab;
    EXPECT_LE(error_of(got.grads[1], exact.grads[1]), 16 * kBf16) << s.rows << " x " << s.vocab;
    const Pass plain = run([&](const Tensors& t) { return linear_cross_entropy_sum(t[0], t[1], ids); },
                           {x.to(at::kBFloat16), w}, seven_tenths);
    EXPECT_TRUE(same_bits(plain.output, got.output)) << "a bf16 x asks for the same";
    EXPECT_EQ(plain.grads[0].scalar_type(), at::kBFloat16);
    EXPECT_TRUE(same_bits(plain.grads[1], got.grads[1]));
  }
}

TEST(LossTest, StridesDoNotMatter) {
  const at::Tensor x = normal({6, 17}, 1).t(), w = normal({6, 19}, 2).t(), ids = at::arange(34).slice(0, 0, 34, 2) % 19;
  ASSERT_FALSE(ids.narrow(0, 0, 17).is_contiguous() && x.is_contiguous());
  const at::Tensor spread = at::empty({34}, at::kLong).slice(0, 0, 34, 2).copy_(ids);
  const auto loss = [&](const at::Tensor& t) {
    return [&](const Tensors& in) { return linear_cross_entropy_sum(in[0], in[1], t); };
  };
  const Pass a = run(loss(spread), {x, w}, seven_tenths),
             b = run(loss(ids), {x.contiguous(), w.contiguous()}, seven_tenths);
  EXPECT_LE(error_of(a.output, b.output), 16 * kF32);
  EXPECT_LE(error_of(a.grads[0], b.grads[0]), 16 * kF32);
  EXPECT_LE(error_of(a.grads[1], b.grads[1]), 16 * kF32);
  const at::Tensor logits = normal({19, 17}, 3).t();
  EXPECT_TRUE(same_bits(cross_entropy_sum(logits, spread), cross_entropy_sum(logits.contiguous(), ids)));
}

TEST(LossTest, InDoubleItIsLibTorchs) {
  const at::Tensor ids = targets({17, 5, 11}, Ignored::kSome);
  const Tensors in = {normal({17, 5}, 1, at::kDouble), normal({11, 5}, 2, at::kDouble)};
  const at::Tensor exact = exact_loss(at::mm(in[0], in[1].t()), ids);
  EXPECT_LE(error_of(cross_entropy_sum(at::mm(in[0], in[1].t()), ids), exact), 1e-14);
  EXPECT_LE(error_of(linear_cross_entropy_sum(in[0], in[1], ids), exact), 32 * kF32) << "logits in f32";
}

TEST(LossTest, LogitsAreLeftAsTheyWere) {
  const at::Tensor logits = normal({5, 7}, 1), before = logits.clone();
  cross_entropy_sum(logits, at::zeros({5}, at::kLong));
  EXPECT_TRUE(same_bits(logits, before));
}

TEST(LossTest, HugeLogitsNeitherOverflowNorHideNans) {
  const at::Tensor logits =
      torch::tensor({{1e30F, 0.0F, -1e30F}, {0.0F, 1e30F, 0.0F}, {-1e30F, 0.0F, 1e30F}, {-1e30F, -1e30F, -1e30F}})
          .requires_grad_();
  const at::Tensor loss = cross_entropy_sum(logits, torch::tensor({0, 1, 2, 2}));
  EXPECT_NEAR(loss.item<double>(), std::log(3.0), 8 * kF32);
  EXPECT_TRUE(torch::autograd::grad({loss}, {logits})[0].isfinite().all().item<bool>());
  for (int64_t place = 0; place < 3; ++place) {
    at::Tensor bad = at::zeros({1, 3});
    bad[0][place] = NAN;
    EXPECT_TRUE(cross_entropy_sum(bad, torch::tensor({1})).isnan().item<bool>()) << place;
  }
}

TEST(LossTest, WhatDoesNotFitIsRefused) {
  const at::Tensor x = at::ones({2, 3}), w = at::ones({5, 3});
  for (const int64_t target : {-1, 5, -101, 1 << 30}) {
    EXPECT_THROW(linear_cross_entropy_sum(x, w, torch::tensor({int64_t{0}, target})), CheckFailed) << target;
    EXPECT_THROW(cross_entropy_sum(at::ones({2, 5}), torch::tensor({target, int64_t{0}})), CheckFailed) << target;
  }
  EXPECT_THROW(linear_cross_entropy_sum(x, w, at::zeros({3}, at::kLong)), CheckFailed);
  EXPECT_THROW(linear_cross_entropy_sum(x, w, at::zeros({2}, at::kInt)), CheckFailed);
  EXPECT_THROW(linear_cross_entropy_sum(x, at::ones({5, 4}), at::zeros({2}, at::kLong)), CheckFailed);
  EXPECT_THROW(linear_cross_entropy_sum(x, at::ones({0, 3}), at::zeros({2}, at::kLong)), CheckFailed);
  EXPECT_THROW(cross_entropy_sum(at::ones({2, 0}), at::full({2}, kIgnore)), CheckFailed);
  EXPECT_THROW(cross_entropy_sum(at::ones({2, 5}), at::zeros({1}, at::kLong)), CheckFailed);
}

int g_products = 0;

TEST(LossTest, ProductsForGradientsAreMadeOnlyWhereTheyAreWanted) {
  const auto products = [](bool x_needs, bool w_needs, bool grad_mode) {
    const at::Tensor x = at::ones({2, 3}).requires_grad_(x_needs), w = at::ones({5, 3}).requires_grad_(w_needs);
    const at::AutoGradMode mode(grad_mode);
    g_products = 0;
    const auto handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback([](const at::RecordFunction& f) -> std::unique_ptr<at::ObserverContext> {
          g_products += std::string(f.name()) == "aten::mm";
          return nullptr;
        }).scopes({at::RecordScope::FUNCTION}));
    linear_cross_entropy_sum(x, w, at::zeros({2}, at::kLong));
    at::removeCallback(handle);
    return g_products;
  };
  EXPECT_EQ(products(true, true, true), 3);
  EXPECT_EQ(products(false, true, true), 2);
  EXPECT_EQ(products(true, false, true), 2);
  EXPECT_EQ(products(false, false, true), 1);
  EXPECT_EQ(products(true, true, false), 1) << "an evaluation pays for gradients";
}

}  // namespace
}  // namespace lockstep::nn
