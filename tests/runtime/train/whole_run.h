#pragma once

#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/train/trainer.h>

#include "../base/temp_dir.h"
#include "regression_task.h"

// Whole runs on threads, and what they leave.
namespace lockstep::train::test {

using Weights = std::map<std::string, std::vector<float>>;

inline Options small_run(const std::string& run_dir) {
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

inline Weights weights_of(const torch::nn::Module& model) {
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
inline Outcome run_on(
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

inline std::vector<nlohmann::json> lines_of(const std::string& path) {
  std::vector<nlohmann::json> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

inline std::vector<std::string> events_of(const TempDir& dir) {
  std::vector<std::string> events;
  for (const nlohmann::json& line : lines_of(dir / "ledger.jsonl")) events.push_back(line.at("event"));
  return events;
}

}  // namespace lockstep::train::test
