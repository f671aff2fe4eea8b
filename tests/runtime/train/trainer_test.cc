// Whole runs on threads. The oracle is a loop of a dozen lines in plain LibTorch.
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/data/loader.h>
#include <lockstep/metrics/run_log.h>
#include <lockstep/train/trainer.h>

#include "stack_task.h"
#include "whole_run.h"

namespace lockstep::train {
namespace {

using nlohmann::json;
using test::events_of;
using test::lines_of;
using test::Outcome;
using test::Plane;
using test::RegressionTask;
using test::run_on;
using test::small_run;
using test::StackTask;
using test::Weights;
using test::weights_of;
using testing::AllOf;
using testing::HasSubstr;

class TrainerTest : public testing::TestWithParam<int> {  // world_size
 protected:
  TempDir dir_;
  Options options_ = small_run(dir_.path());
};
INSTANTIATE_TEST_SUITE_P(WorldSizes, TrainerTest, testing::Values(1, 2, 3, 8));

TEST_P(TrainerTest, TrainsLikeAPlainLoop) {
  options_.clip_norm = 0.5;
  options_.schedule.kind = "constant";
  options_.schedule.warmup_steps = 0;
  const Outcome ours = run_on(GetParam(), options_);

  RegressionTask task;
  const auto model = task.make_model();
  {
    const torch::NoGradGuard no_grad;
    for (const auto& item : model->named_parameters()) task.initialize(item.key(), item.value(), options_.seed);
  }
  std::vector<at::Tensor> matrices, others;
  for (const auto& tensor : model->parameters()) (tensor.dim() >= 2 ? matrices : others).push_back(tensor);
  const auto with_decay = [&](double decay) {
    auto adam = std::make_unique<torch::optim::AdamWOptions>(options_.schedule.learning_rate);
    adam->betas({0.9, 0.95});
    adam->weight_decay(decay);
    return adam;
  };
  torch::optim::AdamW optimizer({{matrices, with_decay(options_.weight_decay)}, {others, with_decay(0)}});
  data::TrainingLoader loader(
      task.training,
      {.seed = options_.seed, .micro_batch_size = 2, .num_leaves = 8, .leaves = {0, 1, 2, 3, 4, 5, 6, 7}});
  const auto lines = lines_of(dir_ / "metrics.jsonl");
  ASSERT_EQ(lines.size(), 12);
  for (const json& line : lines) {
    optimizer.zero_grad();
    at::Tensor loss = torch::zeros({});
    int64_t count = 0;
    for (const data::Batch& batch : loader.next()) {
      loss = loss + task.loss(*model, batch).sum;
      count += task.count(batch);
    }
    loss = loss / count;
    loss.backward();
    const double norm = torch::nn::utils::clip_grad_norm_(model->parameters(), 0.5);
    optimizer.step();
    EXPECT_NEAR(line.at("loss").get<double>(), loss.item<double>(), 1e-5 * loss.item<double>());
    EXPECT_NEAR(line.at("grad_norm").get<double>(), norm, 1e-5 * norm);
    EXPECT_EQ(line.at("samples").get<int64_t>(), count);
    EXPECT_DOUBLE_EQ(line.at("learning_rate").get<double>(), 0.02);
  }
  for (const auto& [name, values] : weights_of(*model)) {
    for (size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(ours.weights.at(name)[i], values[i], 2e-5) << name;
  }
}

TEST_P(TrainerTest, AnInterruptedRunEndsWithTheBitsOfAnUninterruptedOne) {
  const TempDir other;
  const Outcome whole = run_on(1, small_run(other.path()));
  ASSERT_FALSE(whole.weights.empty());
  for (const bool in_background : {false, true}) {
    const TempDir dir;
    options_.run_dir = dir.path();
    options_.asynchronous_save = in_background;
    const auto interrupted = [&](int64_t at) {
      EXPECT_THROW(run_on(GetParam(), options_,
                          [&](RegressionTask& task) {
                            auto left = std::make_shared<std::atomic<int64_t>>(at);
                            task.disturb = [left](at::Tensor&, const data::Batch&) {
                              if (left->fetch_sub(1) == 0) throw IoError("pulling", "the plug", EIO);
                            };
                          }),
                   Error);
    };
    interrupted((6 * 8) / GetParam());         // some micro-batch of the seventh step, after the checkpoint of step 5
    interrupted((6 * 8) / GetParam());         // of the twelfth, where that one was durable
    const Outcome ours = run_on(3, options_);  // on another number of ranks
    EXPECT_TRUE(in_background || ours.result.resumed_from == 10) << ours.result.resumed_from;
    EXPECT_EQ(ours.weights, whole.weights);
    EXPECT_EQ(ours.result.loss, whole.result.loss);
    const auto lines = lines_of(dir / "metrics.jsonl");
    ASSERT_EQ(lines.size(), 12) << "each step stands once";
    for (size_t i = 0; i < lines.size(); ++i) EXPECT_EQ(lines[i].at("step"), i + 1);
  }
}

// Whoever computes a micro-batch, on whatever lane, once or twice, and after whatever interruption.
TEST_P(TrainerTest, WhatLibTorchDrawsDependsOnTheMicroBatchAlone) {
  const auto noisy = [](RegressionTask& task) { task.is_noisy = true; };
  const auto set_up = [](Options& options) {
    options.steps = 4;
    options.checkpoint_interval_steps = 2;
    options.asynchronous_save = false;
  };
  const TempDir other;
  Options plain = small_run(other.path());
  set_up(plain);
  plain.parallel_micro_batches = 1;
  const Outcome whole = run_on(1, plain, noisy);
  ASSERT_FALSE(whole.weights.empty());
  for (const int stage : {0, 3}) {
    for (const Recompute how : {Recompute::kNone, Recompute::kFull}) {
      for (const int lanes : {1, 2}) {
        const TempDir dir;
        Options options = small_run(dir.path());
        set_up(options);
        options.zero_stage = stage;
        options.recompute = how;
        options.parallel_micro_batches = lanes;
        const Outcome ours = run_on(GetParam(), options, noisy);
        EXPECT_EQ(ours.result.loss, whole.result.loss) << stage << " " << static_cast<int>(how) << " " << lanes;
        EXPECT_EQ(ours.weights, whole.weights) << stage << " " << static_cast<int>(how) << " " << lanes;
      }
    }
  }
  set_up(options_);
  EXPECT_THROW(run_on(GetParam(), options_,
                      [&](RegressionTask& task) {
                        noisy(task);
                        task.disturb = [left = std::make_shared<std::atomic<int>>(20 / GetParam())](
                                           at::Tensor&, const data::Batch&) {
                          if (left->fetch_sub(1) == 0) throw IoError("pulling", "the plug", EIO);
                        };
                      }),
               Error);
  const Outcome resumed = run_on(GetParam(), options_, noisy);
  EXPECT_EQ(resumed.result.resumed_from, 2);
  EXPECT_EQ(resumed.weights, whole.weights);
}

TEST_P(TrainerTest, EvaluatesEverySampleOnce) {
  const auto validation = std::make_shared<Plane>(23);  // no multiple of anything
  options_.eval_interval_steps = 6;
  double expected = 0;
  run_on(GetParam(), options_, [&](RegressionTask& task) { task.validation = validation; });
  Outcome ours;
  run_local_ranks(1, [&](ProcessGroup& group) {  // finished: only to get at the model
    RegressionTask task;
    task.validation = validation;
    options_.run_dir = dir_ / "again";
    task.when_finished = [&](torch::nn::Module& model) {
      std::vector<int64_t> all(23);
      for (int64_t i = 0; i < 23; ++i) all[i] = i;
      const torch::NoGradGuard no_grad;
      const data::Batch batch = validation->get(all);
      expected = task.loss(model, batch).sum.item<double>() / static_cast<double>(task.count(batch));
    };
    ours.result = train(group, at::kCPU, task, options_);
  });
  EXPECT_NEAR(ours.result.validation_loss, expected, 1e-5 * expected);
  options_.run_dir = dir_ / "third";
  const Outcome third = run_on(GetParam(), options_, [&](RegressionTask& task) { task.validation = validation; });
  EXPECT_EQ(third.result.validation_loss, ours.result.validation_loss);
  EXPECT_GT(third.result.validation_accuracy, 0);
  EXPECT_LE(third.result.validation_accuracy, 1);
}

TEST_P(TrainerTest, AStepThatIsNotFiniteIsSkippedByAll) {
  const auto poison = [](int64_t last_bad_call) {
    return [last_bad_call](RegressionTask& task) {
      auto calls = std::make_shared<std::atomic<int64_t>>(0);
      task.disturb = [calls, last_bad_call](at::Tensor& loss, const data::Batch&) {
        if ((*calls)++ <= last_bad_call) loss = loss * std::numeric_limits<float>::infinity();
      };
    };
  };
  options_.steps = 4;
  const Outcome ours = run_on(GetParam(), options_, poison(0));  // one micro-batch a rank, in the first step
  EXPECT_EQ(ours.result.steps, 4);
  EXPECT_TRUE(std::isfinite(ours.result.loss));
  EXPECT_THAT(events_of(dir_), testing::ElementsAre("start", "skipped", "durable", "end"));
  EXPECT_EQ(lines_of(dir_ / "metrics.jsonl").size(), 3);

  options_.run_dir = dir_ / "hopeless";
  options_.steps = 20;
  try {
    run_on(GetParam(), options_, poison(1'000'000));
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("gradient of"), HasSubstr("4 steps running"), HasSubstr("Mend")));
  }
}

TEST_P(TrainerTest, ARunLeavesWhatToolsRead) {
  run_on(GetParam(), options_);
  EXPECT_THAT(events_of(dir_), testing::ElementsAre("start", "durable", "durable", "durable", "end"));
  EXPECT_EQ(metrics::verify_ledger(real_fs(), dir_ / "ledger.jsonl"), 5);
  const json record = json::parse(std::ifstream(dir_ / "run.json"));
  EXPECT_EQ(record.at("world_size"), GetParam());
  EXPECT_EQ(record.at("config").at("global_batch_size"), 16);
  EXPECT_EQ(record.at("training_data"), "plane");
  int boards = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir_.path()))
    boards += entry.path().filename().string().starts_with("events.out.tfevents.");
  EXPECT_EQ(boards, 1);
  EXPECT_FALSE(std::filesystem::is_empty(dir_ / "logs"));
  EXPECT_TRUE(std::filesystem::exists(dir_ / "epoch/1.done")) << "the next start, on any host, need not wait";
  const auto mode = std::filesystem::status(dir_.path()).permissions();
  EXPECT_EQ(mode & std::filesystem::perms::others_all, std::filesystem::perms::none);
  for (const json& line : lines_of(dir_ / "metrics.jsonl")) {
    for (const char* field :
         {"loss", "grad_norm", "learning_rate", "samples", "step_s", "samples_per_s", "memory_bytes", "accuracy"})
      EXPECT_TRUE(line.contains(field)) << field;
  }

  const Outcome again = run_on(GetParam(), options_);
  EXPECT_EQ(again.result.resumed_from, 12);
  EXPECT_TRUE(again.weights.empty()) << "a run that is done does not train";
}

class PipelineTest : public testing::Test {
 protected:
  struct Outcome {
    std::vector<json> metrics;
    std::vector<double> validation;  // loss and accuracy
    Weights weights;
  };
  static Outcome run(int stages, int chunks, const std::function<void(StackTask&)>& prepare) {
    const TempDir dir;
    Options options = small_run(dir.path());
    options.steps = 3;
    options.mesh.pipeline = stages;
    options.pipeline_chunks = chunks;
    if (chunks > 1) options.pipeline_schedule = "interleaved";
    options.parallel_micro_batches = 1;
    Outcome outcome;
    run_local_ranks(stages, [&](ProcessGroup& group) {
      StackTask task;
      prepare(task);
      task.when_finished = [&](torch::nn::Module& model) { outcome.weights = weights_of(model); };
      const Result result = train(group, at::kCPU, task, options);
      if (group.rank() == 0) outcome.validation = {result.validation_loss, result.validation_accuracy};
    });
    outcome.metrics = lines_of(dir / "metrics.jsonl");
    for (json& line : outcome.metrics) {
      json kept;
      for (const char* key : {"step", "loss", "grad_norm", "accuracy"}) kept[key] = line.value(key, json());
      line = kept;
    }
    return outcome;
  }
  static void expect_like_one_stage(const std::function<void(StackTask&)>& prepare) {
    const Outcome whole = run(1, 1, prepare);
    EXPECT_EQ(whole.metrics.size(), 3);
    for (const auto& [stages, chunks] : {std::pair(2, 1), std::pair(4, 1), std::pair(2, 2)}) {
      const Outcome cut = run(stages, chunks, prepare);
      EXPECT_EQ(cut.metrics, whole.metrics) << stages << " x " << chunks;
      EXPECT_EQ(cut.weights, whole.weights) << stages << " x " << chunks;
      EXPECT_EQ(cut.validation, whole.validation) << stages << " x " << chunks;
    }
  }
  static std::string refusal_of(const std::function<void(StackTask&)>& prepare) {
    try {
      run(2, 1, prepare);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "not refused";
  }
  // What the stack returns is no loss here, and its input not the batch's.
  static LossSum own_loss(LayerStack& stack, const std::vector<at::Tensor>& batch) {
    const at::Tensor error = stack.forward({batch[0] + 0.1 * torch::randn_like(batch[0])}) - batch[1];
    return {(error.abs() * torch::rand_like(error)).sum(), (error.abs() < 1).sum()};
  }
};

TEST_F(PipelineTest, ATasksOwnLossAndWhatLibTorchDrawsDoNotDependOnTheCut) {
  expect_like_one_stage([](StackTask& task) {
    task.is_noisy = true;
    task.own_loss = own_loss;
    task.validation = std::make_shared<Plane>(23);
  });
}

TEST_F(PipelineTest, ALossThatNoStageCouldComputeIsRefused) {
  EXPECT_THAT(refusal_of([](StackTask& task) {
                task.own_loss = [](LayerStack& stack, const std::vector<at::Tensor>& batch) {
                  return LossSum{stack.forward(batch) + stack.forward(batch), {}};
                };
              }),
              AllOf(HasSubstr("forward twice"), HasSubstr("Mend")));
  EXPECT_THAT(refusal_of([](StackTask& task) {
                task.own_loss = [](LayerStack& stack, const std::vector<at::Tensor>&) {
                  return LossSum{stack.parameters()[0].sum(), {}};
                };
              }),
              AllOf(HasSubstr("does not call the model's forward"), HasSubstr("Mend")));
}

TEST_F(PipelineTest, ABufferThatForwardWritesIsNamed) {
  EXPECT_THAT(refusal_of([](StackTask& task) { task.counts_calls = true; }),
              AllOf(HasSubstr("buffer"), HasSubstr(".calls"), HasSubstr("GroupNorm")));
}

class TrainerMistakeTest : public TrainerTest {
 protected:
  void expect_refusal(const std::function<void(RegressionTask&)>& prepare,
                      const testing::Matcher<std::string>& message) {
    try {
      run_on(2, options_, prepare);
      ADD_FAILURE() << "not refused";
    } catch (const ConfigError& error) {
      EXPECT_THAT(std::string(error.what()), message);
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Once, TrainerMistakeTest, testing::Values(2));

TEST_P(TrainerMistakeTest, AParameterThatNobodyFillsIsNamed) {
  options_.zero_stage = 3;
  expect_refusal([](RegressionTask& task) { task.forgotten = "2.bias"; },
                 AllOf(HasSubstr("'2.bias'"), HasSubstr("Mend")));
}

TEST_P(TrainerMistakeTest, AChangedConfigurationIsRefusedByKeyUntilItIsAccepted) {
  options_.steps = 5;
  run_on(2, options_);
  options_.steps = 7;
  options_.schedule.learning_rate = 0.5;
  const auto other_task = [](RegressionTask& task) { task.config = R"({"width": 8})"; };
  expect_refusal(other_task, AllOf(HasSubstr("steps: was 5, now 7"), HasSubstr("learning_rate: was 0.02, now 0.5"),
                                   HasSubstr("task.width: was not there, now 8"), HasSubstr("--accept_config_change")));
  options_.accept_config_change = {"steps", "learning_rate", "task.width"};
  EXPECT_EQ(run_on(2, options_, other_task).result.resumed_from, 5);
}

TEST_P(TrainerMistakeTest, OtherTrainingDataIsRefused) {
  options_.steps = 6;
  options_.asynchronous_save = false;
  EXPECT_THROW(run_on(2, options_,
                      [](RegressionTask& task) {
                        task.disturb = [calls = 0](at::Tensor&, const data::Batch&) mutable {
                          if (++calls > 22) throw IoError("pulling", "the plug", EIO);
                        };
                      }),
               Error);
  expect_refusal([](RegressionTask& task) { task.training = std::make_shared<Plane>(50, "other files"); },
                 AllOf(HasSubstr("plane then"), HasSubstr("other files now"), HasSubstr("Mend")));
}

TEST_P(TrainerMistakeTest, ABufferThatForwardWritesIsNamed) {
  expect_refusal([](RegressionTask& task) { task.batch_norm = true; },
                 AllOf(HasSubstr("buffer 2."), HasSubstr("GroupNorm")));
}

TEST_P(TrainerMistakeTest, TooLittleDataIsRefusedBeforeAnythingIsWritten) {
  options_.run_dir = dir_ / "new";
  expect_refusal([](RegressionTask& task) { task.training = std::make_shared<Plane>(15); },
                 AllOf(HasSubstr("15 samples"), HasSubstr("--global_batch_size=16")));
  EXPECT_FALSE(std::filesystem::exists(options_.run_dir));
}

TEST_P(TrainerMistakeTest, ARunDirectoryThatCannotBeIsRefusedOnEveryRank) {
  std::ofstream(dir_ / "file") << "in the way";
  options_.run_dir = dir_ / "file/run";
  expect_refusal([](RegressionTask&) {}, AllOf(HasSubstr("--run_dir="), HasSubstr("Mend")));
  options_.run_dir = dir_ / "open";
  std::filesystem::create_directory(options_.run_dir);
  std::filesystem::permissions(options_.run_dir, std::filesystem::perms::all);
  expect_refusal([](RegressionTask&) {}, AllOf(HasSubstr("every user"), HasSubstr("chmod o-w")));
}

TEST_P(TrainerMistakeTest, AStartThatWasTakenOverStopsAtItsNextSave) {
  Weights rivals;
  run_local_ranks(1, [&](ProcessGroup& group) {
    RegressionTask task;
    bool tried = false;
    task.disturb = [&](at::Tensor&, const data::Batch&) {
      if (std::exchange(tried, true)) return;
      rivals = run_on(1, options_).weights;  // of the same process, so nothing has to be waited for
    };
    options_.parallel_micro_batches = 1;
    EXPECT_THROW(train(group, at::kCPU, task, options_), Fenced);
  });
  const TempDir other;
  EXPECT_EQ(rivals, run_on(1, small_run(other.path())).weights);
  EXPECT_EQ(run_on(1, options_).result.resumed_from, 12) << "the rival's checkpoints are whole";
}

}  // namespace
}  // namespace lockstep::train
