#include <cmath>
#include <cstring>
#include <thread>

#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/optim/optimizer.h>

#include "../../support/same_bits.h"

namespace lockstep::optim {
namespace {

constexpr int kSteps = 40;
constexpr double kUnit = 0x1p-24;  // rounding of one f32 operation, relative

at::Tensor normal(const at::IntArrayRef sizes, uint64_t key, double scale = 1) {
  at::Tensor x = at::empty(sizes, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i)
    x.mutable_data_ptr<float>()[i] = static_cast<float>(scale) * normal_at(key, static_cast<uint64_t>(i));
  return x;
}

double farthest(const at::Tensor& a, const at::Tensor& b) {
  return a.numel() == 0 ? 0 : (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// Matrices with weight decay, vectors without, an empty tensor, sizes that no vector register divides.
struct Model {
  std::vector<LocalParameter> parameters;

  explicit Model(uint64_t seed = 1) {
    add("matrix", {17, 3}, true, seed);
    add("bias", {7}, false, seed);
    add("one", {1}, true, seed);
    add("empty", {0, 5}, true, seed);
    add("norm", {33}, false, seed);
    add("embedding", {1001, 3}, true, seed);
  }
  void add(const std::string& name, at::IntArrayRef sizes, bool decay, uint64_t seed) {
    parameters.push_back({name, normal(sizes, stream_key(seed, name)), at::zeros(sizes), decay});
  }
  // Sizes differ by parameter and step, and some elements have a gradient of exactly 0.
  void set_grads(int step) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      at::Tensor& grad = parameters[i].grad;
      grad.copy_(normal(grad.sizes(), stream_key(9, i, static_cast<uint64_t>(step)), 0.1 * std::pow(4.0, i)));
      if (grad.numel() > 2) grad.view(-1)[2] = 0;
    }
  }
  std::vector<torch::Tensor> copies(at::ScalarType type) const {
    std::vector<torch::Tensor> all;
    for (const auto& local : parameters) all.push_back(local.parameter.to(type, false, /*copy=*/true));
    for (auto& tensor : all) tensor.requires_grad_();
    return all;
  }
};

double rate_of(int step) { return 1e-2 * (1 + step % 3); }

// LibTorch's optimizer in f64 on the same gradients, decaying and not decaying parameters in groups of their own.
// `scale` multiplies the gradients, as a clip coefficient does.
template <typename Options, typename Oracle>
void expect_agreement(Optimizer& ours, Options options, double weight_decay, double scale, double tolerance) {
  Model model;
  std::vector<torch::Tensor> exact = model.copies(at::kDouble), decaying, plain;
  for (size_t i = 0; i < exact.size(); ++i) (model.parameters[i].decay ? decaying : plain).push_back(exact[i]);
  auto plain_options = std::make_unique<Options>(options);
  auto decay_options = std::make_unique<Options>(options);
  plain_options->weight_decay(0);
  decay_options->weight_decay(weight_decay);
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(decaying, std::move(decay_options));
  groups.emplace_back(plain, std::move(plain_options));
  Oracle oracle(groups, options);

  ours.attach(model.parameters);
  for (int step = 0; step < kSteps; ++step) {
    model.set_grads(step);
    for (size_t i = 0; i < exact.size(); ++i)
      exact[i].mutable_grad() = model.parameters[i].grad.to(at::kDouble) * scale;
    for (auto& group : oracle.param_groups()) group.options().set_lr(rate_of(step));
    oracle.step();
    ours.step({.learning_rate = rate_of(step), .grad_scale = scale, .step = step + 1});
    for (size_t i = 0; i < exact.size(); ++i)
      ASSERT_LE(farthest(model.parameters[i].parameter, exact[i]), tolerance)
          << model.parameters[i].name << " after step " << step;
  }
}

// Each step rounds the parameter (|p| < 8 here) once or twice and adds an update of at most about 5 rates, which is off
// by a few dozen roundings; steps add up.
constexpr double kAdamTolerance = kSteps * (2 * 8 * kUnit + 5 * 3e-2 * 32 * kUnit);

class AdamWTest : public testing::TestWithParam<AdamWOptions> {};
INSTANTIATE_TEST_SUITE_P(Options, AdamWTest,
                         testing::Values(AdamWOptions{}, AdamWOptions{.beta2 = 0.999, .weight_decay = 0.01},
                                         AdamWOptions{.beta1 = 0.8, .epsilon = 1e-3, .weight_decay = 0},
                                         AdamWOptions{.beta1 = 0, .beta2 = 0.5, .epsilon = 1e-6, .weight_decay = 2}));

TEST_P(AdamWTest, FollowsLibTorchInDoubleOverManySteps) {
  const AdamWOptions& o = GetParam();
  for (const double scale : {1.0, 0.37}) {
    const auto ours = make_adamw(o);
    expect_agreement<torch::optim::AdamWOptions, torch::optim::AdamW>(
        *ours, torch::optim::AdamWOptions(1).betas({o.beta1, o.beta2}).eps(o.epsilon), o.weight_decay, scale,
        kAdamTolerance);
  }
}

class SgdTest : public testing::TestWithParam<SgdOptions> {};
INSTANTIATE_TEST_SUITE_P(Options, SgdTest,
                         testing::Values(SgdOptions{}, SgdOptions{.momentum = 0}, SgdOptions{.weight_decay = 0.1},
                                         SgdOptions{.momentum = 0.5, .weight_decay = 0.02, .nesterov = true}));

TEST_P(SgdTest, FollowsLibTorchInDoubleOverManySteps) {
  const SgdOptions& o = GetParam();
  for (const double scale : {1.0, 0.37}) {
    const auto ours = make_sgd(o);
    // The largest gradients here are about 0.1 * 4^5 * 4; momentum 0.9 makes ten of them, and the parameter wanders
    // to some thousands.
    constexpr double kTolerance = kSteps * 4096 * 4 * kUnit;
    expect_agreement<torch::optim::SGDOptions, torch::optim::SGD>(
        *ours, torch::optim::SGDOptions(1).momentum(o.momentum).nesterov(o.nesterov), o.weight_decay, scale,
        kTolerance);
  }
}

TEST(AdamWTest, DecayIsDecoupledAndLeavesUndecayedParametersAlone) {
  Model model;
  const Model before;
  const auto optimizer = make_adamw({.weight_decay = 0.5});
  optimizer->attach(model.parameters);
  for (int step = 0; step < 3; ++step) optimizer->step({.learning_rate = 0.1, .step = step + 1});  // gradients are 0
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    at::Tensor expected = before.parameters[i].parameter.clone();
    for (int step = 0; step < 3 && model.parameters[i].decay; ++step) expected.mul_(static_cast<float>(1 - 0.1 * 0.5));
    EXPECT_TRUE(at::equal(model.parameters[i].parameter, expected)) << model.parameters[i].name;
  }
}

// The arithmetic of optim/src/kernels.h, one element at a time: what every instruction set must give to the bit.
TEST(AdamWTest, EachElementGoesThroughTheWrittenOutSequence) {
  const auto f = [](double value) { return static_cast<float>(value); };
  const AdamWOptions o{.beta2 = 0.999};
  constexpr int64_t kElements = 1'000'003;
  const at::Tensor p = normal({kElements}, 1), g = normal({kElements}, 2, 0.3);
  std::vector<float> want(p.const_data_ptr<float>(), p.const_data_ptr<float>() + kElements), m(kElements), v(kElements);
  const auto optimizer = make_adamw(o);
  optimizer->attach({{"p", p, g, true}});
  for (int step = 1; step <= 3; ++step) {
    optimizer->step({.learning_rate = 0.01, .grad_scale = 0.7, .step = step});
    const float rate = f(0.01 / (1 - std::pow(o.beta1, step))), root = f(1 / std::sqrt(1 - std::pow(o.beta2, step)));
    for (int64_t i = 0; i < kElements; ++i) {
      const float grad = g.const_data_ptr<float>()[i] * f(0.7);
      m[i] = std::fma(f(1 - o.beta1), grad, f(o.beta1) * m[i]);
      v[i] = std::fma(f(1 - o.beta2), grad * grad, f(o.beta2) * v[i]);
      want[i] = std::fma(-rate, m[i] / std::fma(std::sqrt(v[i]), root, f(o.epsilon)), want[i] * f(1 - 0.01 * 0.1));
    }
  }
  EXPECT_EQ(std::memcmp(p.const_data_ptr<float>(), want.data(), p.nbytes()), 0);
  const auto state = optimizer->state();
  EXPECT_EQ(std::memcmp(state[0].tensor.const_data_ptr<float>(), m.data(), p.nbytes()), 0);
  EXPECT_EQ(std::memcmp(state[1].tensor.const_data_ptr<float>(), v.data(), p.nbytes()), 0);
}

TEST(SgdTest, EachElementGoesThroughTheWrittenOutSequence) {
  const auto f = [](double value) { return static_cast<float>(value); };
  constexpr int64_t kElements = 10'007;
  for (const bool nesterov : {false, true}) {
    const at::Tensor p = normal({kElements}, 1), g = normal({kElements}, 2, 0.3);
    std::vector<float> want(p.const_data_ptr<float>(), p.const_data_ptr<float>() + kElements), m(kElements);
    const auto optimizer = make_sgd({.momentum = 0.9, .weight_decay = 0.03, .nesterov = nesterov});
    optimizer->attach({{"p", p, g, true}});
    for (int step = 1; step <= 3; ++step) {
      optimizer->step({.learning_rate = 0.01, .grad_scale = 0.7, .step = step});
      for (int64_t i = 0; i < kElements; ++i) {
        const float grad = std::fma(f(0.03), want[i], g.const_data_ptr<float>()[i] * f(0.7));
        m[i] = std::fma(f(0.9), m[i], grad);
        want[i] = std::fma(-f(0.01), nesterov ? std::fma(f(0.9), m[i], grad) : m[i], want[i]);
      }
    }
    EXPECT_EQ(std::memcmp(p.const_data_ptr<float>(), want.data(), p.nbytes()), 0) << nesterov;
  }
}

class AnyOptimizerTest : public testing::TestWithParam<const char*> {
 protected:
  static std::unique_ptr<Optimizer> make() {
    return std::string(GetParam()) == "adamw" ? make_adamw({}) : make_sgd({.weight_decay = 0.1, .nesterov = true});
  }
  static size_t kinds() { return std::string(GetParam()) == "adamw" ? 2 : 1; }
};
INSTANTIATE_TEST_SUITE_P(Optimizers, AnyOptimizerTest, testing::Values("adamw", "sgd"));

TEST_P(AnyOptimizerTest, ShardsGetTheBitsTheWholeTensorGets) {
  constexpr int64_t kElements = 100'003;
  const at::Tensor whole = normal({kElements}, 1), whole_grad = normal({kElements}, 2);
  const at::Tensor cut = whole.clone(), cut_grad = whole_grad.clone();
  std::vector<LocalParameter> shards;  // at addresses and of lengths that suit no vector register
  for (int64_t begin = 0, i = 0; begin < kElements; ++i) {
    const int64_t length =
        std::min<int64_t>(1 + philox4x32(3, static_cast<uint64_t>(i), 0)[0] % 5000, kElements - begin);
    shards.push_back({"w", cut.narrow(0, begin, length), cut_grad.narrow(0, begin, length), true});
    begin += length;
  }
  const auto one = make(), many = make();
  one->attach({{"w", whole, whole_grad, true}});
  many->attach(shards);
  for (int step = 1; step <= 5; ++step) {
    one->step({.learning_rate = 0.03, .grad_scale = 0.9, .step = step});
    many->step({.learning_rate = 0.03, .grad_scale = 0.9, .step = step});
  }
  EXPECT_TRUE(same_bits(whole, cut));
}

TEST_P(AnyOptimizerTest, PartsOnThreadsCoverEveryElementOnceWithTheSameBits) {
  Model whole;
  whole.add("large", {1, 12'345}, true, 3);
  const auto reference = make();
  reference->attach(whole.parameters);
  for (int step = 0; step < 3; ++step) {
    whole.set_grads(step);
    reference->step({.learning_rate = 0.03, .step = step + 1});
  }
  for (const int parts : {1, 2, 3, 4, 7, 16, 100}) {
    Model cut;
    cut.add("large", {1, 12'345}, true, 3);
    const auto optimizer = make();
    optimizer->attach(cut.parameters);
    for (int step = 0; step < 3; ++step) {
      cut.set_grads(step);
      std::vector<std::thread> lanes(parts);
      for (int part = 0; part < parts; ++part) {
        lanes[part] =
            std::thread([&, part] { optimizer->step({.learning_rate = 0.03, .step = step + 1}, part, parts); });
      }
      for (auto& lane : lanes) lane.join();
    }
    for (size_t i = 0; i < cut.parameters.size(); ++i)
      EXPECT_TRUE(same_bits(cut.parameters[i].parameter, whole.parameters[i].parameter))
          << cut.parameters[i].name << " in " << parts << " parts";
  }
}

TEST_P(AnyOptimizerTest, StateIsNamedInAttachOrderStartsAtZeroAndIsAllThereIsToSave) {
  Model model, resumed;
  const auto first = make();
  first->attach(model.parameters);
  const auto state = first->state();
  ASSERT_EQ(state.size(), model.parameters.size() * kinds());
  for (size_t i = 0; i < state.size(); ++i) {
    EXPECT_EQ(state[i].parameter, model.parameters[i / kinds()].name);
    EXPECT_EQ(state[i].kind, kinds() == 1 ? "momentum" : i % 2 == 0 ? "exp_avg" : "exp_avg_sq");
    EXPECT_EQ(state[i].tensor.sizes(), model.parameters[i / kinds()].parameter.sizes());
    EXPECT_FALSE(state[i].tensor.any().item<bool>()) << "not zero at the start";
  }
  const auto run = [](Optimizer& optimizer, Model& m, int from, int to) {
    for (int step = from; step < to; ++step) {
      m.set_grads(step);
      optimizer.step({.learning_rate = 0.02, .step = step + 1});
    }
  };
  run(*first, model, 0, 4);
  const auto second = make();
  for (size_t i = 0; i < model.parameters.size(); ++i)
    resumed.parameters[i].parameter.copy_(model.parameters[i].parameter);
  second->attach(resumed.parameters);
  for (size_t i = 0; i < state.size(); ++i) second->state()[i].tensor.copy_(state[i].tensor);
  run(*first, model, 4, 8);
  run(*second, resumed, 4, 8);
  for (size_t i = 0; i < model.parameters.size(); ++i)
    EXPECT_TRUE(same_bits(model.parameters[i].parameter, resumed.parameters[i].parameter)) << model.parameters[i].name;
}

TEST_P(AnyOptimizerTest, AttachingAnewStartsAnew) {
  Model first, second, reference;
  const auto reused = make(), fresh = make();
  reused->attach(first.parameters);
  first.set_grads(0);
  reused->step({.learning_rate = 0.5});
  second.parameters.erase(second.parameters.begin());  // so that indices of the first list are wrong for the second
  reference.parameters.erase(reference.parameters.begin());
  reused->attach(second.parameters);
  fresh->attach(reference.parameters);
  EXPECT_EQ(reused->state().size(), fresh->state().size());
  for (int step = 0; step < 2; ++step) {
    second.set_grads(step), reference.set_grads(step);
    reused->step({.learning_rate = 0.1, .step = step + 1});
    fresh->step({.learning_rate = 0.1, .step = step + 1});
  }
  for (size_t i = 0; i < second.parameters.size(); ++i)
    EXPECT_TRUE(same_bits(second.parameters[i].parameter, reference.parameters[i].parameter));
}

TEST_P(AnyOptimizerTest, GradientsAreOnlyRead) {
  Model model;
  model.set_grads(0);
  Model before;
  before.set_grads(0);
  const auto optimizer = make();
  optimizer->attach(model.parameters);
  optimizer->step({.learning_rate = 0.1, .grad_scale = 0.5});
  for (size_t i = 0; i < model.parameters.size(); ++i)
    EXPECT_TRUE(same_bits(model.parameters[i].grad, before.parameters[i].grad));
}

TEST_P(AnyOptimizerTest, TensorsItCannotUpdateAreRefusedByName) {
  const at::Tensor good = at::zeros({4, 3});
  const std::vector<std::pair<at::Tensor, at::Tensor>> bad = {
      {good.t(), at::zeros({3, 4})},  {good, at::zeros({3, 4}).t()}, {good.to(at::kDouble), good},
      {good, good.to(at::kBFloat16)}, {good, at::zeros({11})},       {good, at::Tensor()},
      {at::Tensor(), good},
  };
  for (size_t i = 0; i < bad.size(); ++i) {
    try {
      make()->attach({{"block3.up.weight", bad[i].first, bad[i].second, true}});
      ADD_FAILURE() << "case " << i << " was taken";
    } catch (const CheckFailed& error) {
      EXPECT_NE(std::string(error.what()).find("block3.up.weight"), std::string::npos) << error.what();
    }
  }
  EXPECT_NO_THROW(make()->attach({{"flat gradient", good, at::zeros({12}), true}}));
}

TEST_P(AnyOptimizerTest, NothingToUpdateIsFine) {
  const auto optimizer = make();
  optimizer->attach({});
  EXPECT_NO_THROW(optimizer->step({.learning_rate = 1}));
  EXPECT_NO_THROW(optimizer->step({.learning_rate = 1}, 2, 3));
  EXPECT_TRUE(optimizer->state().empty());
}

TEST(ClipCoefficientTest, BringsTheNormToTheLimitAndNeverRaisesIt) {
  EXPECT_EQ(clip_coefficient(0.5, 1.0), 1.0);
  EXPECT_EQ(clip_coefficient(0.0, 1.0), 1.0);
  EXPECT_EQ(clip_coefficient(4.0, 1.0), 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(clip_coefficient(4.0, 3.0), 3.0 / (4.0 + 1e-6));
  EXPECT_LT(clip_coefficient(1.0, 1.0), 1.0) << "LibTorch's clip_grad_norm_ has the same 1e-6";
  EXPECT_EQ(clip_coefficient(1e30, 0.0), 1.0) << "0 is off";
  EXPECT_EQ(clip_coefficient(1e30, -1.0), 1.0);
}

TEST(ClipCoefficientTest, ClipsAsLibTorchDoes) {
  for (const double max_norm : {0.1, 1.0, 7.0, 1e6}) {
    const at::Tensor grad = normal({1003}, 4);
    at::Tensor parameter = at::zeros({1003}).requires_grad_();
    parameter.mutable_grad() = grad.clone();
    const double norm = torch::nn::utils::clip_grad_norm_(parameter, max_norm);
    const at::Tensor clipped = grad * clip_coefficient(norm, max_norm);
    // Two f32 roundings each way, of elements below 5.
    EXPECT_LE(farthest(clipped, parameter.grad()), 5 * 4 * kUnit) << max_norm;
  }
}

}  // namespace
}  // namespace lockstep::optim
