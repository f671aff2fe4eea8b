// Whole runs on threads. The oracle is a loop of a dozen lines in plain LibTorch.
#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/data/loader.h>
#include <lockstep/format/fencing.h>
#include <lockstep/metrics/run_log.h>
#include <lockstep/train/trainer.h>

#include "../base/temp_dir.h"
#include "regression_task.h"

namespace lockstep::train {
namespace {

using nlohmann::json;
using test::Plane;
using test::RegressionTask;
using testing::AllOf;
using testing::HasSubstr;
using Weights = std::map<std::string, std::vector<float>>;

Options small_run(const std::string& run_dir) {
  Options options;
  options.run_dir = run_dir;
  options.steps = 12;
  options.global_batch_size = 16;
  options.micro_batch_size = 2;
  options.schedule.learning_rate = 0.02;
  options.schedule.warmup_steps = 3;
  options.checkpoint_interval_steps = 5;
  options.eval_interval_steps = 0;
  options.log_interval_steps = 1000;
  return options;
}

Weights weights_of(const torch::nn::Module& model) {
  Weights weights;
  for (const auto& item : model.named_parameters()) {
    const at::Tensor values = item.value().detach().contiguous();
    weights[item.key()] = {values.const_data_ptr<float>(), values.const_data_ptr<float>() + values.numel()};
  }
  return weights;
}

struct Outcome {
  Result result;  // rank 0's
  Weights weights;
};

// Each rank's task is `prepare`d alike.
Outcome run_on(
    int world_size, const Options& options,
    const std::function<void(RegressionTask&)>& prepare = [](RegressionTask&) {}, Fs& fs = real_fs()) {
  Outcome outcome;
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    RegressionTask task;
    prepare(task);
    task.when_finished = [&](torch::nn::Module& model) { outcome.weights = weights_of(model); };  // rank 0 alone
    const Result result = train(group, at::kCPU, task, options, fs);
    if (group.rank() == 0) outcome.result = result;
  });
  return outcome;
}

std::vector<json> lines_of(const std::string& path) {
  std::vector<json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(json::parse(line));
  return lines;
}

std::vector<std::string> events_of(const TempDir& dir) {
  std::vector<std::string> events;
  for (const json& line : lines_of(dir / "ledger.jsonl")) events.push_back(line.at("event"));
  return events;
}

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

TEST(TrainerCheckpointTest, WeightsOfAnotherRunStartANewOneAtStepZero) {
  const TempDir first, second;
  const Outcome source = run_on(1, small_run(first.path()));
  Options options = small_run(second.path());
  for (const auto& entry : std::filesystem::directory_iterator(first / "checkpoints"))
    if (entry.path().filename().string().starts_with("step-00000012")) options.init_from = entry.path();
  ASSERT_FALSE(options.init_from.empty());
  options.steps = 1;
  options.schedule.learning_rate = 0;
  options.schedule.warmup_steps = 0;
  const Outcome started = run_on(2, options);
  EXPECT_EQ(started.result.resumed_from, -1);
  EXPECT_EQ(started.weights, source.weights);
}

// The steps of a durable checkpoint do not run again: a kill right after it must not lose their lines.
TEST(TrainerCheckpointTest, LinesOfItsStepsAreThereBeforeACheckpointIs) {
  const TempDir dir;
  std::vector<size_t> lines_at_commit;
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    if (kind == "rename" && path.ends_with("MANIFEST"))
      lines_at_commit.push_back(lines_of(dir / "metrics.jsonl").size());
    return Fault{};
  });
  run_on(
      2, small_run(dir.path()), [](RegressionTask&) {}, fs);
  EXPECT_THAT(lines_at_commit, testing::ElementsAre(5, 10, 12));
}

// As after SIGSTOP while a checkpoint is loaded, --take_over and SIGCONT: its files would replace the newer start's.
TEST(TrainerCheckpointTest, AStartThatIsSupersededWhileItLoadsWritesNothingIntoTheRun) {
  const TempDir dir;
  run_on(1, small_run(dir.path()));
  Options more = small_run(dir.path());
  more.steps = 20;
  more.accept_config_change = {"steps"};
  const std::vector<std::string> files = {dir / "ledger.jsonl", dir / "metrics.jsonl", dir / "run.json"};
  std::vector<std::string> before;
  for (const std::string& file : files) before.push_back(read_text(real_fs(), file, 1 << 20));
  std::atomic<bool> superseded = false;
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    if (kind == "read" && path.find("shard-") != std::string::npos && !superseded.exchange(true))
      format::create_epoch(real_fs(), dir.path(), {.take_over = true});
    return Fault{};
  });
  EXPECT_THROW(run_on(
                   1, more, [](RegressionTask&) {}, fs),
               Fenced);
  EXPECT_TRUE(superseded);
  for (size_t i = 0; i < files.size(); ++i) EXPECT_EQ(read_text(real_fs(), files[i], 1 << 20), before[i]) << files[i];
}

// Removes the MANIFEST of each checkpoint whose folder's name has `step` in it.
std::vector<std::filesystem::path> lose_manifests(const TempDir& dir, const std::string& step) {
  std::vector<std::filesystem::path> folders;
  for (const auto& entry : std::filesystem::directory_iterator(dir / "checkpoints")) {
    if (entry.path().filename().string().find(step) == std::string::npos) continue;
    if (std::filesystem::remove(entry.path() / "MANIFEST")) folders.push_back(entry.path());
  }
  return folders;
}

// Storage stands still until a later step has begun: only a run that goes on meanwhile gets there in time.
TEST(TrainerCheckpointTest, TrainingGoesOnWhileACheckpointIsWritten) {
  const TempDir dir, other;
  std::atomic<int64_t> losses = 0;
  const auto in_step = [](int64_t losses) { return losses / 8 + 1; };  // micro-batches of a step
  std::vector<int64_t> stood_until;
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    if (kind != "allocate" || path.find("step-00000005") == std::string::npos) return Fault{};
    for (int waited_ms = 0; in_step(losses) < 8 && waited_ms < 20'000; ++waited_ms)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    stood_until.push_back(in_step(losses));
    return Fault{};
  });
  const auto count = [&](RegressionTask& task) { task.disturb = [&](at::Tensor&, const data::Batch&) { ++losses; }; };
  const Outcome ours = run_on(2, small_run(dir.path()), count, fs);
  ASSERT_FALSE(stood_until.empty());
  EXPECT_GE(stood_until[0], 8);
  EXPECT_THAT(events_of(dir), testing::ElementsAre("start", "durable", "durable", "durable", "end"));
  for (const json& line : lines_of(dir / "ledger.jsonl")) {
    if (line.at("event") != "durable") continue;
    EXPECT_GT(line.at("stall_s"), 0);
    EXPECT_LE(line.at("stall_s"), line.at("save_s"));
  }
  Options waiting = small_run(other.path());
  waiting.asynchronous_save = false;
  EXPECT_EQ(run_on(2, waiting).weights, ours.weights);
  lose_manifests(dir, "step-00000012"), lose_manifests(other, "step-00000012");
  EXPECT_EQ(run_on(1, small_run(dir.path())).weights, ours.weights) << "from step 10, saved in the background";
}

TEST(TrainerCheckpointTest, SavesAsOftenAsPaysWhereNoNumberOfStepsIsGiven) {
  const auto slowly = [](RegressionTask& task) {
    task.disturb = [](at::Tensor&, const data::Batch&) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  };
  const TempDir often, seldom;
  Options options = small_run(often.path());
  options.checkpoint_interval_steps = -1;
  options.mean_time_between_failures_h = 1e-7;
  const Outcome ours = run_on(2, options, slowly);
  options.run_dir = seldom.path();
  options.mean_time_between_failures_h = 1000;
  EXPECT_EQ(run_on(2, options, slowly).weights, ours.weights);
  EXPECT_THAT(events_of(seldom), testing::ElementsAre("start", "durable", "end"));
  const auto events = events_of(often);
  EXPECT_GE(std::count(events.begin(), events.end(), "durable"), 3);
}

TEST(TrainerCheckpointTest, KeepEveryStepsKeepsForGood) {
  const TempDir dir;
  Options options = small_run(dir.path());
  options.checkpoint_interval_steps = 2;
  options.keep_checkpoints = 2;
  options.keep_every_steps = 4;
  run_on(2, options);
  std::vector<std::string> kept;
  for (const auto& entry : std::filesystem::directory_iterator(dir / "checkpoints"))
    kept.push_back(entry.path().filename());
  EXPECT_THAT(kept, testing::UnorderedElementsAre("step-00000004.e0001", "step-00000008.e0001", "step-00000010.e0001",
                                                  "step-00000012.e0001"));
}

// A person who starts over, or from a checkpoint by its path, has left the steps before: no crash brings them back.
TEST(TrainerCheckpointTest, ALineOfStepsThatWasLeftIsNotGoneBackTo) {
  const TempDir dir, source;
  run_on(2, small_run(dir.path()));
  const auto dies_early = [](RegressionTask& task) {
    auto calls = std::make_shared<std::atomic<int>>(0);
    task.disturb = [calls](at::Tensor&, const data::Batch&) {
      if (++*calls > 10) throw std::runtime_error("killed");
    };
  };
  Options options = small_run(dir.path());
  options.resume = "never";
  EXPECT_ANY_THROW(run_on(2, options, dies_early));
  options.resume = "auto";
  EXPECT_ANY_THROW(run_on(2, options, dies_early)) << "starts over again, so it trains";
  const Outcome over = run_on(2, options);
  EXPECT_EQ(over.result.resumed_from, -1);
  EXPECT_EQ(run_on(2, options).result.resumed_from, 12) << "what was saved since is gone on with";

  for (const auto& entry : std::filesystem::directory_iterator(dir / "checkpoints"))
    if (entry.path().filename().string().starts_with("step-00000005")) options.resume = entry.path();
  EXPECT_ANY_THROW(run_on(2, options, dies_early));
  const std::string path = std::exchange(options.resume, "auto");
  try {
    run_on(2, options);
    ADD_FAILURE() << "went back to step 12";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr(path), HasSubstr("--resume=never")));
  }
  options.resume = path;
  const Outcome from_path = run_on(2, options);
  EXPECT_EQ(from_path.result.resumed_from, 5);
  EXPECT_EQ(from_path.weights, over.weights);
  options.resume = "auto";
  EXPECT_EQ(run_on(2, options).result.resumed_from, 12);
}

TEST(TrainerCheckpointTest, AFullDiskCostsTheCheckpointAndNotTheRun) {
  const TempDir dir;
  FaultFs fs(real_fs(), [](const std::string& kind, const std::string& path, int64_t) {
    return kind == "allocate" && path.find("step-00000005") != std::string::npos ? Fault{.error_number = ENOSPC}
                                                                                 : Fault{};
  });
  const Outcome ours = run_on(
      2, small_run(dir.path()), [](RegressionTask&) {}, fs);
  EXPECT_EQ(ours.result.steps, 12);
  EXPECT_THAT(events_of(dir), testing::ElementsAre("start", "durable", "durable", "end"));
  const TempDir other;
  EXPECT_EQ(ours.weights, run_on(1, small_run(other.path())).weights);
}

TEST(TrainerCheckpointTest, ALostManifestIsDamageAndNeverAFreshStart) {
  const TempDir dir;
  const Options options = small_run(dir.path());
  const Outcome whole = run_on(2, options);
  const auto last = lose_manifests(dir, "step-00000012");
  ASSERT_EQ(last.size(), 1);
  const Outcome again = run_on(2, options);
  EXPECT_EQ(again.result.resumed_from, 10);
  EXPECT_EQ(again.weights, whole.weights);
  EXPECT_GE(std::distance(std::filesystem::directory_iterator(last[0]), {}), 1) << "kept for a person to look at";
  EXPECT_EQ(lose_manifests(dir, "step-").size(), 3);
  EXPECT_THROW(run_on(2, options), CorruptData);
  Options anew = options;
  anew.resume = "never";
  EXPECT_EQ(run_on(2, anew).weights, whole.weights);
}

TEST(TrainerCheckpointTest, LogsThatCannotBeWrittenDoNotEndTheRun) {
  const TempDir dir;
  int notes = 0;
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    const auto writes = [&](const char* file) { return kind == "write" && path.find(file) != std::string::npos; };
    const bool second_note = writes("ledger.jsonl") && ++notes == 3;  // its first write is what was there before
    const bool first_of_metrics = writes("metrics.jsonl") && notes == 2;
    return first_of_metrics || second_note ? Fault{.error_number = ENOSPC, .short_bytes = 7} : Fault{};
  });
  const Outcome ours = run_on(
      2, small_run(dir.path()), [](RegressionTask&) {}, fs);
  EXPECT_EQ(ours.result.steps, 12);
  EXPECT_THAT(events_of(dir), testing::ElementsAre("start", "durable", "durable", "durable", "end"));
  EXPECT_EQ(metrics::verify_ledger(real_fs(), dir / "ledger.jsonl"), 5);
  EXPECT_EQ(lines_of(dir / "metrics.jsonl").size(), 12);
}

// The last save is tried again; a run whose end is not saved has not ended well.
TEST(TrainerCheckpointTest, ARunEndsWellOnlyWhenItsEndIsSaved) {
  for (const int failures : {2, 3}) {
    const TempDir dir;
    int tries = 0;
    FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
      const bool fails = kind == "mkdir" && path.find("step-00000012") != std::string::npos && ++tries <= failures;
      return fails ? Fault{.error_number = ENOSPC} : Fault{};
    });
    const auto run = [&] {
      run_on(
          2, small_run(dir.path()), [](RegressionTask&) {}, fs);
    };
    if (failures == 2) {
      EXPECT_NO_THROW(run());
      continue;
    }
    try {
      run();
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), ExitCode::kStorage);
      EXPECT_THAT(error.what(), AllOf(HasSubstr("step 12"), HasSubstr("step 10 is the last"), HasSubstr("Mend")));
    }
    EXPECT_EQ(run_on(2, small_run(dir.path())).result.resumed_from, 10);
  }
}

}  // namespace
}  // namespace lockstep::train
