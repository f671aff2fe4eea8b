// A tensor that units share with each other, or with what lies outside: gathered, reduced, saved and loaded once.
#include <atomic>

#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <lockstep/sharding/unit.h>

#include "whole_run.h"

namespace lockstep::train {
namespace {

using nlohmann::json;
using test::lines_of;
using test::Plane;
using test::small_run;
using test::Weights;
using test::weights_of;

struct Half : torch::nn::Module {
  Half(int64_t in, const at::Tensor& shared)
      : linear(register_module("linear", torch::nn::Linear(in, 8))), matrix(register_parameter("matrix", shared)) {}
  at::Tensor forward(const at::Tensor& x) { return at::tanh(linear(x).matmul(matrix)); }
  torch::nn::Linear linear;
  at::Tensor matrix;
};

// All it has is shared.
struct Turn : torch::nn::Module {
  explicit Turn(const at::Tensor& shared) : matrix(register_parameter("turn", shared)) {}
  at::Tensor forward(const at::Tensor& x) {
    ++runs;
    return at::tanh(x.matmul(matrix)) + x;
  }
  static inline std::atomic<int> runs = 0;
  at::Tensor matrix;
};

struct Last : torch::nn::Module {
  explicit Last(const at::Tensor& shared)
      : linear(register_module("linear", torch::nn::Linear(8, 1))), scale(register_parameter("scale", shared)) {}
  at::Tensor forward(const at::Tensor& x) { return linear(x * scale); }
  torch::nn::Linear linear;
  at::Tensor scale;
};

// `matrix` is in three units; `scale` in one unit and outside.
struct Shared : torch::nn::Module {
  Shared() {
    const at::Tensor matrix = torch::zeros({8, 8});
    scale = register_parameter("scale", torch::zeros({8}));
    first = register_module("first", unit<Half>(4, matrix));
    second = register_module("second", unit<Half>(8, first->matrix));
    turn = register_module("turn", unit<Turn>(first->matrix));
    last = register_module("last", unit<Last>(scale));
  }
  at::Tensor forward(const at::Tensor& x) {
    return last->forward(turn->forward(second->forward(first->forward(x))) + scale);
  }
  at::Tensor scale;
  std::shared_ptr<Unit<Half>> first, second;
  std::shared_ptr<Unit<Turn>> turn;
  std::shared_ptr<Unit<Last>> last;
};

class SharedTask : public test::RegressionTask {
 public:
  std::shared_ptr<torch::nn::Module> make_model() override { return std::make_shared<Shared>(); }
  LossSum loss(torch::nn::Module& model, const data::Batch& batch) override {
    const auto tensors = batch.valid_tensors();
    const at::Tensor error = dynamic_cast<Shared&>(model).forward(tensors[0]).view({-1}) - tensors[1];
    return {(error * error * tensors[2]).sum(), {}};
  }
};

struct SharedRun {
  Result result;
  std::vector<double> losses;
  Weights weights;
};

SharedRun run_shared(int world_size, const Options& options) {
  SharedRun run;
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    SharedTask task;
    task.validation = std::make_shared<Plane>(7, "more of it");
    task.when_finished = [&](torch::nn::Module& model) { run.weights = weights_of(model); };  // rank 0 alone
    const Result result = train(group, at::kCPU, task, options);
    if (group.rank() == 0) run.result = result;
  });
  for (const json& line : lines_of(options.run_dir + "/metrics.jsonl")) run.losses.push_back(line.at("loss"));
  return run;
}

Options options_in(const TempDir& dir) {
  Options options = small_run(dir.path());
  options.steps = 6;
  options.checkpoint_interval_steps = 3;
  options.eval_interval_steps = 3;
  options.schedule.kind = "constant";
  return options;
}

class SharedParametersTest : public testing::TestWithParam<int> {};  // world size
INSTANTIATE_TEST_SUITE_P(WorldSizes, SharedParametersTest, testing::Values(1, 2, 3));

TEST_P(SharedParametersTest, TrainTheSameBitsInEveryLayout) {
  const TempDir plain;
  const SharedRun alone = run_shared(1, options_in(plain));
  ASSERT_EQ(alone.weights.at("first.matrix"), alone.weights.at("turn.turn"));
  ASSERT_EQ(alone.losses.size(), 6);
  for (const int stage : {0, 1, 2, 3}) {
    for (const Recompute how : {Recompute::kNone, Recompute::kFull}) {
      const TempDir dir;
      Options options = options_in(dir);
      options.zero_stage = stage;
      options.recompute = how;
      Turn::runs = 0;
      const SharedRun ours = run_shared(GetParam(), options);
      EXPECT_EQ(Turn::runs, (how == Recompute::kFull ? 2 : 1) * 6 * 8 + 2 * 4) << "validation has 4 micro-batches";
      EXPECT_EQ(ours.losses, alone.losses) << stage << " " << static_cast<int>(how);
      EXPECT_EQ(ours.result.validation_loss, alone.result.validation_loss) << stage << " " << static_cast<int>(how);
      EXPECT_EQ(ours.weights, alone.weights) << stage << " " << static_cast<int>(how);
    }
  }
}

TEST_P(SharedParametersTest, AreSavedOnceAndLoadedInAnotherLayout) {
  const TempDir plain, dir;
  const SharedRun alone = run_shared(1, options_in(plain));
  Options options = options_in(dir);
  options.zero_stage = 3;
  options.steps = 3;
  run_shared(GetParam(), options);
  options.steps = 6;
  options.accept_config_change = {"steps"};
  options.zero_stage = GetParam() % 2 == 0 ? 1 : 3;
  options.recompute = Recompute::kFull;
  const SharedRun resumed = run_shared(GetParam() % 3 + 1, options);
  EXPECT_EQ(resumed.result.resumed_from, 3);
  EXPECT_EQ(resumed.weights, alone.weights);
}

}  // namespace
}  // namespace lockstep::train
