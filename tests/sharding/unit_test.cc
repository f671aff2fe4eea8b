#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/nn/linear.h>
#include <lockstep/sharding/layer_stack.h>
#include <lockstep/sharding/unit.h>

namespace lockstep {
namespace {

// Writes down which units were called, and runs them.
struct Calls : UnitRuntime {
  std::vector<size_t> units;
  std::function<at::Tensor()> last;
  at::Tensor call(size_t unit, const std::function<at::Tensor()>& body) override {
    units.push_back(unit);
    last = body;
    return body();
  }
};

void bind_units(torch::nn::Module& model, UnitRuntime& runtime) {
  const auto units = find_units(model);
  for (size_t i = 0; i < units.size(); ++i) {
    if (units[i].unit) units[i].unit->bind(&runtime, i);
  }
}

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(int64_t width) : linear(register_module("linear", torch::nn::Linear(width, width))) {}
  at::Tensor forward(const at::Tensor& x) { return x + linear(x); }
  torch::nn::Linear linear;
};
TORCH_MODULE(Block);

TEST(UnitTest, AUnitIsItsLayerAndCallsTakeTheDetour) {
  torch::nn::Sequential model;  // a plain module in front: its parameters are in no unit
  const auto block = unit<BlockImpl>(3);
  model->push_back("plain", torch::nn::Linear(3, 3));
  model->push_back("block", block);
  EXPECT_NE(std::dynamic_pointer_cast<BlockImpl>(block), nullptr);
  EXPECT_TRUE(model->named_parameters().contains("block.linear.weight"));
  const auto units = find_units(*model);
  ASSERT_EQ(units.size(), 2);
  EXPECT_EQ(units[0].unit, nullptr);
  EXPECT_EQ(units[1].name, "block");

  const at::Tensor x = torch::randn({2, 3}), plain = model->forward(x);
  Calls calls;
  bind_units(*model, calls);
  EXPECT_TRUE(model->forward(x).equal(plain)) << "out of a Sequential";
  EXPECT_TRUE(block->forward(x).equal(block->BlockImpl::forward(x)));
  EXPECT_EQ(calls.units, (std::vector<size_t>{1, 1}));
}

TEST(UnitTest, ACallOwnsItsArguments) {
  const auto block = unit<BlockImpl>(3);
  Calls calls;
  block->bind(&calls, 0);
  at::Tensor x = torch::randn({2, 3});
  const at::Tensor y = block->forward(x);
  x = torch::zeros({2, 3});  // the caller's handle means another tensor now
  EXPECT_TRUE(calls.last().equal(y));
}

TEST(UnitTest, AHolderMeansTheLayerItHolds) {
  const auto block = unit<Block>(3);
  static_assert(std::is_base_of_v<BlockImpl, Unit<Block>>);
  const auto linear = unit<torch::nn::Linear>(torch::nn::LinearOptions(3, 4).bias(false));
  EXPECT_EQ(linear->weight.size(0), 4) << "the layer's members are there";
  EXPECT_EQ(linear->parameters().size(), 1);
  EXPECT_EQ(linear->forward(torch::ones({2, 3})).size(1), 4);
  EXPECT_EQ(block->forward(torch::ones({2, 3})).size(1), 3);
}

TEST(UnitTest, ASequentialIsAUnitWhole) {
  const auto layers = unit<torch::nn::Sequential>(torch::nn::Linear(3, 4), torch::nn::Tanh(), torch::nn::Linear(4, 1));
  Calls calls;
  layers->bind(&calls, 7);
  EXPECT_EQ(layers->forward(torch::ones({2, 3})).sizes(), (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(calls.units, std::vector<size_t>{7});
}

struct Masked : torch::nn::Module {
  at::Tensor forward(const at::Tensor& x, const at::Tensor& mask = {}) { return mask.defined() ? x * mask : x; }
};

struct Overloaded : torch::nn::Module {
  at::Tensor forward(const at::Tensor& x) const { return x; }
  at::Tensor forward(const at::Tensor& x, double factor) const { return x * factor; }
};

TEST(UnitTest, DefaultsAndOverloadsOfForwardStay) {
  const at::Tensor x = torch::ones({2});
  EXPECT_TRUE(unit<Masked>()->forward(x).equal(x));
  EXPECT_TRUE(unit<Masked>()->forward(x, 3 * x).equal(3 * x));
  EXPECT_TRUE(unit<Overloaded>()->forward(x).equal(x));
  EXPECT_TRUE(unit<Overloaded>()->forward(x, 2).equal(2 * x));
}

struct Shape : torch::nn::Module {
  virtual at::Tensor forward(at::Tensor x) = 0;
};

struct Doubling : Shape {
  at::Tensor forward(at::Tensor x) override { return 2 * x; }
};

TEST(UnitTest, AVirtualForwardTakesTheDetourThroughItsBase) {
  const auto doubling = unit<Doubling>();
  Calls calls;
  doubling->bind(&calls, 0);
  Shape& shape = *doubling;
  EXPECT_EQ(shape.forward(torch::ones({})).item<float>(), 2);
  EXPECT_EQ(calls.units.size(), 1);
}

TEST(UnitTest, WithoutStorageAUnitHasShapesOnly) {
  const auto bytes = [](const Unit<Block>& block) { return block.linear->weight.storage().nbytes(); };
  {
    const WithoutStorage without_storage;
    const auto block = unit<Block>(5);
    EXPECT_EQ(bytes(*block), 0);
    EXPECT_EQ(block->linear->weight.sizes(), (std::vector<int64_t>{5, 5}));
    EXPECT_ANY_THROW(block->forward(torch::ones({2, 5}))) << "weights that are not there are no zeros";
  }
  EXPECT_EQ(bytes(*unit<Block>(5)), 100);
}

// Sets its weights as it is built, as layers of other people do; 4 MiB of them.
struct Table : StackLayer {
  Table() : linear(register_module("linear", std::make_shared<nn::Linear>(1024, 1024))) {
    const torch::NoGradGuard no_grad;
    linear->weight.fill_(3), linear->bias.fill_(5);
  }
  at::Tensor forward(at::Tensor x, const std::vector<at::Tensor>&) override { return linear->forward(x); }
  std::shared_ptr<nn::Linear> linear;
};

TEST(UnitTest, ASecondUseTakesNoMemoryOfItsOwn) {
  nn::install_cpu_allocator();
  const nn::MemoryScope memory(nn::MemoryKind::kParameters);
  LayerStack stack(
      {{"first", [] { return std::make_shared<Table>(); }}, {"last", [] { return std::make_shared<Table>(); }}},
      {{"first.linear.weight", "last.linear.weight"}});
  nn::reset_peaks();
  const int64_t before = nn::cpu_memory(nn::MemoryKind::kParameters).current_bytes;
  stack.build();
  const int64_t weight = 4 << 20, bias = 4 << 10;
  EXPECT_LE(nn::cpu_memory(nn::MemoryKind::kParameters).peak_bytes - before, weight + 2 * bias);
  const auto parameters = stack.named_parameters();
  EXPECT_EQ(parameters["last.linear.weight"].data_ptr(), parameters["first.linear.weight"].data_ptr());
  EXPECT_TRUE(parameters["last.linear.bias"].eq(5).all().item<bool>()) << "what is not shared stays as it was built";
}

TEST(UnitTest, WithoutStorageOurLargeLayersAreNeverThere) {
  nn::install_cpu_allocator();
  const nn::MemoryScope memory(nn::MemoryKind::kParameters);
  nn::reset_peaks();
  const int64_t before = nn::cpu_memory(nn::MemoryKind::kParameters).current_bytes;
  const WithoutStorage without_storage;
  LayerStack stack({{"only", [] { return std::make_shared<Table>(); }}});
  stack.build();
  EXPECT_LE(nn::cpu_memory(nn::MemoryKind::kParameters).peak_bytes - before, 4 << 10);
  EXPECT_EQ(stack.parameters()[0].storage().nbytes(), 0);
}

TEST(UnitTest, AUnitInsideAUnitIsRefused) {
  const auto outer = unit<torch::nn::Sequential>();
  outer->push_back("inner", unit<Block>(3));
  const auto model = std::make_shared<torch::nn::Module>();  // LibTorch walks modules that are shared alone
  model->register_module("outer", outer);
  EXPECT_THROW(find_units(*model), ConfigError);
}

struct Pair : torch::nn::Module {
  Pair(const at::Tensor& a, const at::Tensor& b) { register_parameter("a", a), register_parameter("b", b); }
  at::Tensor forward(const at::Tensor& x) { return x; }
};

TEST(UnitTest, WhatAUnitSharesIsInNoUnit) {
  const auto fresh = [] { return torch::ones({2}); };
  const at::Tensor of_both = fresh(), outside_too = fresh(), twice = fresh();
  const auto model = std::make_shared<torch::nn::Module>();
  model->register_module("shares_all", unit<Pair>(of_both, outside_too));
  model->register_module("shares_one", unit<Pair>(fresh(), of_both));
  model->register_module("has_two_names", unit<Pair>(twice, twice));
  model->register_parameter("bias", outside_too);
  const auto units = find_units(*model);
  ASSERT_EQ(units.size(), 4);
  EXPECT_EQ(units[0].unit, nullptr);
  EXPECT_EQ(units[0].parameter_names,
            (std::vector<std::string>{"bias", "shares_all.a", "shares_all.b", "shares_one.b"}));
  EXPECT_EQ(units[1].parameter_names, std::vector<std::string>{"shares_one.a"});
  EXPECT_EQ(units[2].parameter_names, (std::vector<std::string>{"has_two_names.a", "has_two_names.b"}));
  EXPECT_EQ(units[3].name, "shares_all") << "last, as it owns nothing";
  EXPECT_TRUE(units[3].parameter_names.empty());
}

}  // namespace
}  // namespace lockstep
