// Whole runs on threads, by what they save and what they go back to.
#include <atomic>
#include <chrono>
#include <filesystem>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/fencing.h>
#include <lockstep/format/reader.h>
#include <lockstep/metrics/run_log.h>

#include "whole_run.h"

namespace lockstep::train {
namespace {

using nlohmann::json;
using test::events_of;
using test::lines_of;
using test::Outcome;
using test::RegressionTask;
using test::run_on;
using test::small_run;
using testing::AllOf;
using testing::HasSubstr;

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
  before.reserve(files.size());
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

TEST(TrainerCheckpointTest, TheManifestVouchesForEveryShardWhereThatIsAskedFor) {
  const TempDir dir;
  Options options = small_run(dir.path());
  options.checkpoint_sha256 = true;
  run_on(2, options);
  const format::Reader reader(real_fs(), format::resolve_checkpoint(real_fs(), dir.path()));
  for (const format::StoredFile& file : reader.manifest().files)
    EXPECT_TRUE(format::is_sha256(file.sha256)) << file.name;
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
