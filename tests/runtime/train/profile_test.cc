// The trace of a run: one file, every rank in it, what the step is made of by name.
#include "profile.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/train/trainer.h>

#include "../base/temp_dir.h"
#include "stack_task.h"

namespace lockstep::train {
namespace {

using nlohmann::json;
using test::StackTask;
using testing::HasSubstr;
using testing::IsSupersetOf;

class ProfileTest : public testing::Test {
 protected:
  ProfileTest() {
    options_.run_dir = dir_.path();
    options_.steps = 6;
    options_.global_batch_size = 16;
    options_.micro_batch_size = 2;
    options_.parallel_micro_batches = 1;
    options_.schedule.learning_rate = 0.01;
    options_.bucket_bytes = 256;  // several buckets
    options_.checkpoint_interval_steps = 4;
    options_.eval_interval_steps = 0;
    options_.log_interval_steps = 1000;
    options_.profile_steps = "3:4";
  }

  void train_on(int world_size, Fs& fs = real_fs()) {
    run_local_ranks(world_size, [&](ProcessGroup& group) {
      StackTask task;
      train(group, at::kCPU, task, options_, fs);
    });
  }

  // Events by rank.
  std::map<int, std::vector<json>> events(const std::string& file = "step-3-4.json") const {
    std::map<int, std::vector<json>> events;
    const json trace = json::parse(std::ifstream(dir_ / ("traces/" + file)));
    for (const json& event : trace.at("traceEvents")) {
      if (event.at("ph") == "X") events[event.at("pid")].push_back(event);
    }
    return events;
  }
  static std::set<std::string> names(const std::vector<json>& events) {
    std::set<std::string> names;
    for (const json& event : events) names.insert(event.at("name"));
    return names;
  }
  static int64_t count(const std::vector<json>& events, const std::string& name) {
    return std::count_if(events.begin(), events.end(), [&](const json& event) { return event.at("name") == name; });
  }
  static std::set<int64_t> values(const std::vector<json>& events, const std::string& name, const std::string& arg) {
    std::set<int64_t> values;
    for (const json& event : events) {
      if (event.at("name") == name) values.insert(event.at("args").at(arg).get<int64_t>());
    }
    return values;
  }

  TempDir dir_;
  Options options_;
};

TEST_F(ProfileTest, DataParallelRanksShowMicroBatchesBucketsAndTheStepsParts) {
  options_.zero_stage = 1;
  train_on(2);
  const auto all = events();
  ASSERT_EQ(all.size(), 2);
  for (const auto& [rank, of_rank] : all) {
    SCOPED_TRACE("rank " + std::to_string(rank));
    EXPECT_THAT(names(of_rank),
                IsSupersetOf({"step", "data", "exchange", "checkpoint", "forward", "backward", "launch reduction",
                              "wait for reduction", "optimizer", "launch parameter gather", "wait for parameters"}));
    EXPECT_EQ(count(of_rank, "step"), 2);
    EXPECT_EQ(values(of_rank, "step", "step"), (std::set<int64_t>{3, 4}));
    EXPECT_EQ(count(of_rank, "forward"), 2 * 4) << "four micro-batches a step";
    EXPECT_EQ(values(of_rank, "backward", "micro_batch").size(), 4);
    const auto buckets = values(of_rank, "launch reduction", "bucket");
    EXPECT_GT(buckets.size(), 1);
    EXPECT_EQ(values(of_rank, "wait for reduction", "bucket"), buckets);
    EXPECT_EQ(count(of_rank, "launch reduction"), 2 * static_cast<int64_t>(buckets.size()));
    const auto gathers = values(of_rank, "launch parameter gather", "bucket");
    EXPECT_GT(gathers.size(), 1);
    EXPECT_EQ(values(of_rank, "wait for parameters", "bucket"), gathers);
  }
}

TEST_F(ProfileTest, ZeRO3ShowsTheGathersOfItsUnits) {
  options_.zero_stage = 3;
  train_on(2);
  for (const auto& [rank, of_rank] : events()) {
    SCOPED_TRACE("rank " + std::to_string(rank));
    EXPECT_EQ(values(of_rank, "launch parameter gather", "unit"), (std::set<int64_t>{0, 1, 2, 3}));
    EXPECT_EQ(values(of_rank, "wait for parameters", "unit"), (std::set<int64_t>{0, 1, 2, 3}));
    EXPECT_EQ(values(of_rank, "launch reduction", "bucket"), (std::set<int64_t>{0, 1, 2, 3}));
  }
}

TEST_F(ProfileTest, APipelineShowsTheActionsOfItsStages) {
  options_.mesh.pipeline = 2;
  train_on(2);
  const auto all = events();
  ASSERT_EQ(all.size(), 2);
  EXPECT_THAT(names(all.at(0)), IsSupersetOf({"forward", "send forward", "receive backward", "backward"}));
  EXPECT_THAT(names(all.at(1)), IsSupersetOf({"receive forward", "forward", "backward", "send backward"}));
  for (const auto& [rank, of_rank] : all) {
    EXPECT_EQ(count(of_rank, "forward"), 2 * 8);
    EXPECT_EQ(values(of_rank, "forward", "micro_batch").size(), 8);
  }
}

TEST_F(ProfileTest, LanesHaveRowsOfTheirOwn) {
  options_.parallel_micro_batches = 3;
  train_on(1);
  std::set<std::string> rows;
  const json trace = json::parse(std::ifstream(dir_ / "traces/step-3-4.json"));
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("name") == "thread_name") rows.insert(event.at("args").at("name"));
  }
  EXPECT_THAT(rows, IsSupersetOf({"step", "compute", "compute, lane 1", "compute, lane 2", "gradient collectives",
                                  "parameter gathers", "optimizer"}));
  EXPECT_EQ(count(events().at(0), "forward"), 2 * 8);
}

TEST_F(ProfileTest, WithoutTheFlagThereIsNoFile) {
  options_.profile_steps = "";
  train_on(2);
  EXPECT_FALSE(std::filesystem::exists(dir_ / "traces"));
}

TEST_F(ProfileTest, StorageThatFailsCostsTheTraceAndNotTheRun) {
  FaultFs fs(real_fs(), [](const std::string&, const std::string& path, int64_t) {
    return path.find("/traces") != std::string::npos ? Fault{.error_number = ENOSPC} : Fault{};
  });
  EXPECT_NO_THROW(train_on(2, fs));
  EXPECT_FALSE(std::filesystem::exists(dir_ / "traces/step-3-4.json"));
}

TEST_F(ProfileTest, AStartBetweenTheStepsTracesWhatIsLeft) {
  options_.steps = 3;
  options_.profile_steps = "";
  train_on(1);
  options_.steps = 6;
  options_.profile_steps = "2:5";
  options_.accept_config_change = {"steps"};
  train_on(2);
  EXPECT_EQ(values(events("step-4-5.json").at(1), "step", "step"), (std::set<int64_t>{4, 5}));
}

TEST(ProfileStepsTest, WhatIsNoRangeIsRefusedWithTheMend) {
  EXPECT_TRUE(parse_steps("").is_empty());
  EXPECT_EQ(parse_steps("7:7").last, 7);
  for (const char* text : {"7", ":", "0:3", "5:4", "1:2:3", "a:b", "1: 2", "-1:2"}) {
    try {
      parse_steps(text);
      ADD_FAILURE() << text;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr("10:12")) << text;
    }
  }
}

}  // namespace
}  // namespace lockstep::train
