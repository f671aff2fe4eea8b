// A link so slow that everything arrives late: no bit changes, whatever is sharded.
#include <fstream>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/collectives/local_group.h>
#include <lockstep/sharding/unit.h>
#include <lockstep/train/trainer.h>

#include "../../support/slow_group.h"
#include "../base/temp_dir.h"
#include "stack_task.h"

namespace lockstep::train {
namespace {

using lockstep::test::SlowGroup;
using lockstep::test::SlowLink;
using test::StackTask;

Options run_of(const std::string& run_dir, int zero_stage) {
  Options options;
  options.run_dir = run_dir;
  options.steps = 6;
  options.global_batch_size = 16;
  options.micro_batch_size = 2;
  options.zero_stage = zero_stage;
  options.bucket_bytes = 256;
  options.schedule.learning_rate = 0.02;
  options.checkpoint_interval_steps = 4;
  options.eval_interval_steps = 0;
  options.log_interval_steps = 1000;
  return options;
}

// Loss and gradient norm of each step, with all their digits.
std::vector<std::string> numbers_of(const std::string& run_dir) {
  std::vector<std::string> numbers;
  std::ifstream file(run_dir + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line);
    numbers.push_back(json.at("loss").dump() + " " + json.at("grad_norm").dump());
  }
  return numbers;
}

class SlowLinkTest : public testing::TestWithParam<int> {};  // ZeRO stage
INSTANTIATE_TEST_SUITE_P(ZeroStages, SlowLinkTest, testing::Values(0, 1, 2, 3));

TEST_P(SlowLinkTest, WhatArrivesLateIsWaitedForAndChangesNoBit) {
  const TempDir alone, late;
  run_local_ranks(1, [&](ProcessGroup& group) {
    StackTask task;
    train(group, at::kCPU, task, run_of(alone.path(), 0));
  });
  run_local_ranks(3, [&](ProcessGroup& group) {
    SlowGroup world(group, std::make_shared<SlowLink>(/*ns_per_byte=*/500));
    StackTask task;
    train(world, at::kCPU, task, run_of(late.path(), GetParam()));
  });
  const auto expected = numbers_of(alone.path());
  ASSERT_EQ(expected.size(), 6);
  EXPECT_EQ(numbers_of(late.path()), expected);
}

// No stack: nothing tells when it reads which parameter. This one reads a unit's before it calls any.
class PenaltyTask : public test::RegressionTask {
 public:
  std::shared_ptr<torch::nn::Module> make_model() override {
    torch::nn::Sequential model(unit<torch::nn::Linear>(4, 8), torch::nn::Tanh(), unit<torch::nn::Linear>(8, 1));
    return model.ptr();
  }
  LossSum loss(torch::nn::Module& model, const data::Batch& batch) override {
    const at::Tensor penalty = model.named_parameters()["2.weight"].square().sum();
    const auto [sum, correct] = RegressionTask::loss(model, batch);
    return {sum + penalty, correct};
  }
};

class SlowLinkOfAnyModelTest : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(ZeroStages, SlowLinkOfAnyModelTest, testing::Values(0, 1, 2));

TEST_P(SlowLinkOfAnyModelTest, ParametersAreWholeBeforeTheirUnitIsCalled) {
  const TempDir alone, late;
  run_local_ranks(1, [&](ProcessGroup& group) {
    PenaltyTask task;
    train(group, at::kCPU, task, run_of(alone.path(), 0));
  });
  run_local_ranks(3, [&](ProcessGroup& group) {
    SlowGroup world(group, std::make_shared<SlowLink>(/*ns_per_byte=*/500));
    PenaltyTask task;
    train(world, at::kCPU, task, run_of(late.path(), GetParam()));
  });
  const auto expected = numbers_of(alone.path());
  ASSERT_EQ(expected.size(), 6);
  EXPECT_EQ(numbers_of(late.path()), expected);
}

}  // namespace
}  // namespace lockstep::train
