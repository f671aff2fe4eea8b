// Dropout and initial values: streams named by keys.
#include <cmath>
#include <cstring>
#include <functional>
#include <set>
#include <thread>

#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/dropout.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/init.h>

#include "compare.h"

namespace lockstep::nn {
namespace {

at::Tensor mask(int64_t n, double p, StepKey key, uint64_t layer) {
  const StepScope scope(key);
  return dropout(at::ones({n}), p, true, layer);
}

TEST(DropoutTest, ElementsAreDecidedByThePhiloxStreamOfTheKey) {  // part of every run's bits
  constexpr int64_t kElements = 1003;
  const at::Tensor got = mask(kElements, 0.3, {1, 2, 3}, 4);
  const uint64_t key = stream_key(stream_key(1, 2, 3, 4), "dropout");
  for (int64_t i = 0; i < kElements; ++i) {
    const uint32_t draw = philox4x32(key, static_cast<uint64_t>(i / 4), 0)[i % 4];
    ASSERT_EQ(got[i].item<float>(), draw / 0x1p32 < 0.7 ? static_cast<float>(1 / 0.7) : 0.0F) << i;
  }
}

TEST(DropoutTest, TheSameKeyGivesTheSameBitsInAnyThreadAndOrder) {
  const StepKey key{5, 6, 7};
  const at::Tensor first = mask(1003, 0.5, key, 1);
  mask(77, 0.5, {9, 9, 9}, 2);
  EXPECT_TRUE(same_bits(mask(1003, 0.5, key, 1), first));
  std::vector<at::Tensor> others(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < others.size(); ++i)
    threads.emplace_back([&, i] {
      mask(static_cast<int64_t>(i), 0.5, {i, 0, 0}, 3);
      others[i] = mask(1003, 0.5, key, 1);
    });
  for (auto& thread : threads) thread.join();
  for (const auto& other : others) EXPECT_TRUE(same_bits(other, first));
}

TEST(DropoutTest, EveryPartOfTheKeyMakesAStreamOfItsOwn) {
  constexpr int64_t kElements = 10'007;
  const std::vector<at::Tensor> masks = {mask(kElements, 0.5, {1, 2, 3}, 4), mask(kElements, 0.5, {2, 2, 3}, 4),
                                         mask(kElements, 0.5, {1, 3, 3}, 4), mask(kElements, 0.5, {1, 2, 4}, 4),
                                         mask(kElements, 0.5, {1, 2, 3}, 5), mask(kElements, 0.5, {2, 1, 3}, 4),
                                         mask(kElements, 0.5, {1, 3, 2}, 4), mask(kElements, 0.5, {1, 2, 4}, 3)};
  for (size_t i = 0; i < masks.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const double agree = masks[i].eq(masks[j]).to(at::kDouble).mean().item<double>();
      EXPECT_NEAR(agree, 0.5, 5 * 0.5 / std::sqrt(kElements)) << i << " " << j;
    }
  }
}

TEST(DropoutTest, AnElementDependsOnItsIndexOnly) {
  const StepScope scope({1, 2, 3});
  const at::Tensor longest = dropout(at::ones({1003}), 0.4, true, 1);
  for (const int64_t n : {0, 1, 3, 4, 5, 17, 1002})
    EXPECT_TRUE(same_bits(dropout(at::ones({n}), 0.4, true, 1), longest.narrow(0, 0, n))) << n;
  const at::Tensor strided = at::ones({59, 17}).t();
  EXPECT_TRUE(same_bits(dropout(strided, 0.4, true, 1), longest.view({17, 59}))) << "by strides, not by index";
}

TEST(DropoutTest, KeepsTheShareItShould) {
  constexpr int64_t kElements = 1'000'003;
  for (const double p : {0.01, 0.1, 0.5, 0.9}) {
    const at::Tensor out = mask(kElements, p, {11, 0, 0}, 0);
    const double kept = out.ne(0).to(at::kDouble).mean().item<double>();
    EXPECT_NEAR(kept, 1 - p, 5 * std::sqrt(p * (1 - p) / kElements)) << p;
    EXPECT_TRUE(out.eq(0).logical_or(out.eq(static_cast<float>(1 / (1 - p)))).all().item<bool>()) << p;
  }
}

TEST(DropoutTest, WithoutWorkToDoItReturnsWhatItGot) {
  const at::Tensor x = normal({3, 7}, 1);
  EXPECT_TRUE(dropout(x, 0.0, true, 1).is_same(x));
  EXPECT_TRUE(dropout(x, 0.5, false, 1).is_same(x));
  EXPECT_FALSE(dropout(x, 1.0, true, 1).any().item<bool>());
}

TEST(DropoutTest, TheGradientGoesThroughWhatWasKeptAndBf16StaysBf16) {
  const StepScope scope({1, 2, 3});
  for (const auto type : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = normal({17, 3}, 1, type).requires_grad_(), y = dropout(x, 0.25, true, 1);
    const at::Tensor scale = dropout(at::ones({17, 3}, type), 0.25, true, 1);
    EXPECT_EQ(y.scalar_type(), type);
    EXPECT_TRUE(same_bits(y.detach(), x.detach() * scale));
    const at::Tensor upstream = normal({17, 3}, 2, type);
    EXPECT_TRUE(same_bits(torch::autograd::grad({y}, {x}, {upstream})[0], upstream * scale));
    EXPECT_LE(error_of(scale, scale.ne(0).to(at::kDouble) / 0.75), type == at::kFloat ? kF32 : kBf16);
  }
}

TEST(StepScopeTest, EndsWithTheKeyThatWas) {
  const StepScope outer({1, 0, 0});
  const at::Tensor before = dropout(at::ones({99}), 0.5, true, 0);
  {
    const StepScope inner({2, 0, 0});
    EXPECT_FALSE(at::equal(dropout(at::ones({99}), 0.5, true, 0), before));
  }
  EXPECT_TRUE(same_bits(dropout(at::ones({99}), 0.5, true, 0), before));
  std::thread([&] {
    EXPECT_FALSE(at::equal(dropout(at::ones({99}), 0.5, true, 0), before)) << "a key of another thread";
  }).join();
}

// By LibTorch's own operators: with and without a tensor, in place, and through other operators.
std::vector<at::Tensor> library_draws() {
  const at::Tensor ones = at::ones({99, 2}), query = at::ones({1, 2, 9, 4});
  return {torch::nn::Dropout(0.5)->forward(ones),
          torch::rand({99}),
          torch::randn({99}),
          torch::randint(1'000'000, {99}),
          torch::randperm(99),
          torch::normal(0.0, 1.0, {99}),
          torch::rand_like(ones),
          torch::multinomial(at::ones({99}), 50),
          torch::poisson(9 * ones),
          torch::rrelu(-ones, 0.1, 0.3, true),
          torch::empty({99}, torch::kBFloat16).exponential_(),
          at::scaled_dot_product_attention(query, query, query, {}, 0.5)};
}

size_t num_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  size_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += at::equal(a[i], b[i]);
  return count;
}

TEST(LibraryDrawsTest, FollowTheKeyInAnyThreadAndLeaveTheDefaultGeneratorAlone) {
  const at::Generator shared = at::globalContext().defaultGenerator(at::kCPU);
  const at::Tensor before = shared.get_state();
  const auto draws_of = [](StepKey key) {
    const StepScope scope(key);
    return library_draws();
  };
  const auto first = draws_of({1, 2, 3});
  EXPECT_EQ(num_equal(draws_of({1, 2, 3}), first), first.size());
  for (const StepKey other : {StepKey{2, 2, 3}, StepKey{1, 3, 3}, StepKey{1, 2, 4}, StepKey{1, 2, 3, 1, 1}})
    EXPECT_EQ(num_equal(draws_of(other), first), 0);
  std::vector<std::vector<at::Tensor>> others(4);
  std::vector<std::thread> threads;
  for (auto& other : others) threads.emplace_back([&] { other = draws_of({1, 2, 3}); });
  for (auto& thread : threads) thread.join();
  for (const auto& other : others) EXPECT_EQ(num_equal(other, first), first.size());
  EXPECT_TRUE(at::equal(shared.get_state(), before));
  library_draws();
  EXPECT_FALSE(at::equal(shared.get_state(), before)) << "outside of a scope all is as LibTorch has it";
}

TEST(LibraryDrawsTest, AnInnerScopeStartsAnewAndTheOuterOneGoesOn) {
  const StepScope outer({1, 2, 3});
  const at::Tensor first = torch::rand({9});
  {
    const StepScope inner({1, 2, 3});
    EXPECT_TRUE(at::equal(torch::rand({9}), first));
  }
  const at::Tensor second = torch::rand({9});
  EXPECT_FALSE(at::equal(second, first));
  const StepScope again({1, 2, 3});
  EXPECT_TRUE(at::equal(torch::rand({18}), at::cat({first, second})));
  begin_part(1);
  const at::Tensor of_part = torch::rand({9});
  const StepScope there({1, 2, 3, /*loss_weight=*/1, /*part=*/1});
  EXPECT_TRUE(at::equal(torch::rand({9}), of_part));
  EXPECT_FALSE(at::equal(of_part, first));
}

TEST(LibraryDrawsTest, AGeneratorThatIsGivenIsUsed) {
  at::Generator given = at::globalContext().defaultGenerator(at::kCPU).clone();
  given.set_current_seed(5);
  const at::Tensor wanted = torch::rand({9}, given);
  given.set_current_seed(5);
  const StepScope scope({1, 2, 3});
  EXPECT_TRUE(at::equal(torch::rand({9}, given), wanted));
}

TEST(InitTest, ElementsAreThoseOfTheNamedStream) {
  const at::Tensor normals = at::empty({3, 7}), uniforms = at::empty({3, 7});
  fill_normal(normals, 5, "block1.up.weight", 0.02);
  fill_uniform(uniforms, 5, "block1.up.weight", 0.3);
  const uint64_t key = stream_key(5, "block1.up.weight");
  for (uint64_t i = 0; i < 21; ++i) {
    EXPECT_EQ(normals.const_data_ptr<float>()[i], 0.02F * normal_at(key, i)) << i;
    EXPECT_EQ(uniforms.const_data_ptr<float>()[i], 0.3F * (2 * uniform_at(key, i) - 1)) << i;
  }
}

TEST(InitTest, OrderShapeStridesAndTypeChangeNothing) {
  const auto filled = [](const at::Tensor& t, uint64_t seed, const std::string& name) {
    fill_normal(t, seed, name, 0.02);
    return t;
  };
  const at::Tensor a = filled(at::empty({6, 7}), 1, "a"), b = filled(at::empty({5}), 1, "b");
  EXPECT_TRUE(same_bits(filled(at::empty({5}), 1, "b"), b));
  EXPECT_TRUE(same_bits(filled(at::empty({6, 7}), 1, "a"), a));
  EXPECT_TRUE(same_bits(filled(at::empty({3, 7}), 1, "a"), a.narrow(0, 0, 3))) << "a shorter tensor has other values";
  EXPECT_TRUE(same_bits(filled(at::empty({7, 6}).t(), 1, "a"), a));
  EXPECT_TRUE(same_bits(filled(at::empty({6, 7}, at::kBFloat16), 1, "a"), a.to(at::kBFloat16)));
  EXPECT_TRUE(same_bits(filled(at::empty({6, 7}).requires_grad_(), 1, "a").detach(), a)) << "a parameter";
  EXPECT_EQ(filled(at::empty({0, 3}), 1, "a").numel(), 0);
  EXPECT_FALSE(at::equal(filled(at::empty({6, 7}), 2, "a"), a));
  EXPECT_FALSE(at::equal(filled(at::empty({6, 7}), 1, "c"), a));
}

TEST(InitTest, ABoxHasTheBitsOfTheWhole) {
  const std::vector<std::pair<const char*, std::function<void(const at::Tensor&)>>> fills = {
      {"normal", [](const at::Tensor& t) { fill_normal(t, 1, "a", 0.02); }},
      {"uniform", [](const at::Tensor& t) { fill_uniform(t, 1, "a", 0.02); }},
      {"constant", [](const at::Tensor& t) { fill_constant(t, 3); }},
      {"by its shape", [](const at::Tensor& t) { fill_normal(t, 1, "a", 1.0 / static_cast<double>(t.size(0))); }},
      {"and something else", [](const at::Tensor& t) { fill_normal(t, 1, "a", 0.02), t.mul_(2); }},
      {"before something else", [](const at::Tensor& t) { t.fill_(2), fill_normal(t.narrow(0, 0, 1), 1, "a", 0.02); }},
      {"no call of ours", [](const at::Tensor& t) { t.copy_(at::arange(t.numel()).view(t.sizes())); }},
      {"through a pointer", [](const at::Tensor& t) { std::memset(t.data_ptr(), 7, t.nbytes()); }},
  };
  struct Where {
    std::vector<int64_t> shape, offsets, sizes;
  };
  const std::vector<Where> boxes = {{{7}, {2}, {3}},          {{6, 5}, {2, 0}, {3, 5}},
                                    {{6, 5}, {1, 2}, {4, 2}}, {{6, 5}, {0, 0}, {6, 5}},
                                    {{6, 5}, {6, 0}, {0, 5}}, {{3, 4, 5}, {1, 1, 2}, {2, 3, 2}}};
  for (const auto& [what, fill] : fills) {
    for (const Where& where : boxes) {
      for (const auto type : {at::kFloat, at::kBFloat16}) {
        const at::Tensor whole = at::empty(where.shape, type), part = at::full(where.sizes, -9, type);
        fill(whole);
        at::Tensor wanted = whole;
        for (size_t dim = 0; dim < where.shape.size(); ++dim)
          wanted = wanted.narrow(static_cast<int64_t>(dim), where.offsets[dim], where.sizes[dim]);
        fill_box(part, where.shape, where.offsets, fill);
        EXPECT_TRUE(same_bits(part, wanted)) << what << " " << at::IntArrayRef(where.sizes) << " " << type;
      }
    }
  }
}

TEST(InitTest, ABoxIsFilledWithoutTheWhole) {
  int calls = 0;
  const at::Tensor part = at::empty({2, 3});
  const auto fill = [&](const at::Tensor& t) {
    ++calls;
    fill_normal(t, 1, "a", 0.02);
  };
  fill_box(part, {int64_t{1} << 40, 3}, {(int64_t{1} << 40) - 2, 0}, fill);  // 12 TiB
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(part[1][2].item<float>(), 0.02F * normal_at(stream_key(1, "a"), 3 * (uint64_t{1} << 40) - 1));
  const auto refuse = [](const at::Tensor&) { throw ConfigError("no such parameter"); };
  EXPECT_THROW(fill_box(part, {9, 3}, {1, 0}, refuse), ConfigError);
  fill_normal(part, 1, "a", 0.02);
  EXPECT_EQ(part[0][0].item<float>(), 0.02F * normal_at(stream_key(1, "a"), 0)) << "the box is forgotten";
}

TEST(InitTest, DistributionsHaveTheirMoments) {
  constexpr int64_t kElements = 1'000'003;
  const at::Tensor x = at::empty({kElements});
  const double root = std::sqrt(kElements);
  fill_normal(x, 3, "n", 0.02);
  EXPECT_NEAR(x.to(at::kDouble).mean().item<double>(), 0, 5 * 0.02 / root);
  EXPECT_NEAR(x.to(at::kDouble).std().item<double>(), 0.02, 5 * 0.02 / std::sqrt(2.0) / root);
  fill_uniform(x, 3, "u", 0.3);
  EXPECT_NEAR(x.to(at::kDouble).mean().item<double>(), 0, 5 * 0.3 / std::sqrt(3.0) / root);
  EXPECT_NEAR(x.to(at::kDouble).square().mean().item<double>(), 0.03, 5 * 0.03 * std::sqrt(0.8) / root);
  EXPECT_GE(x.min().item<double>(), -0.3F);
  EXPECT_LT(x.max().item<double>(), 0.3F);
  fill_constant(x, -1.5);
  EXPECT_TRUE(x.eq(-1.5).all().item<bool>());
}

}  // namespace
}  // namespace lockstep::nn
