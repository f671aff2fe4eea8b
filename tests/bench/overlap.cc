// How much of the communication hides behind compute: 2 ranks, as threads, over a link so slow that a step's bytes
// alone take half as long as its compute. Prints hidden = 1 - (step over the slow link - step without delay) / time of
// the bytes, three times; bench.py knows how much it should be.
//
//     overlap_bench [CASE [FOLDER]]
//
// CASE: zero3-2 is ZeRO-3 with 2 micro-batches of a rank in a step; without one, all. FOLDER keeps the runs, with a
// trace of two steps each.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/train/trainer.h>

#include "../runtime/train/stack_task.h"
#include "../support/slow_group.h"

namespace lockstep {
namespace {

constexpr int kRanks = 2, kRounds = 3;
constexpr int64_t kSteps = 18, kDropped = 4, kLayers = 8, kWidth = 640, kMicroBatch = 192;
constexpr double kShareOfCompute = 0.5;

struct Case {
  int zero_stage;
  int64_t micro_batches;  // of a rank in a step
  std::string name() const { return "zero" + std::to_string(zero_stage) + "-" + std::to_string(micro_batches); }
};

constexpr Case kCases[] = {{1, 1}, {1, 2}, {3, 1}, {3, 2}};

train::Options run_options(const std::string& run_dir, const Case& which) {
  train::Options options;
  options.run_dir = run_dir;
  options.steps = kSteps;
  options.micro_batch_size = kMicroBatch;
  options.global_batch_size = kRanks * which.micro_batches * kMicroBatch;
  options.parallel_micro_batches = 1;
  options.zero_stage = which.zero_stage;
  options.bucket_bytes = int64_t{2} << 20;  // about a layer
  options.schedule.learning_rate = 1e-3;
  options.checkpoint_interval_steps = 0;
  options.eval_interval_steps = 0;
  options.log_interval_steps = kSteps;
  options.profile_steps = std::to_string(kSteps - 3) + ":" + std::to_string(kSteps - 2);
  return options;
}

struct Measured {
  double step_s = 0;  // median
  int64_t bytes = 0;  // a step
};

Measured measure(const std::string& run_dir, const Case& which, double ns_per_byte) {
  const train::Options options = run_options(run_dir, which);
  std::atomic<int64_t> bytes{0};
  run_local_ranks(kRanks, [&](ProcessGroup& group) {
    const auto link = std::make_shared<test::SlowLink>(ns_per_byte);
    test::SlowGroup world(group, link);
    train::test::StackTask task(kLayers, kWidth, 4 * options.global_batch_size);
    train::train(world, at::kCPU, task, options);
    if (group.rank() == 0) bytes = link->bytes();
  });
  std::vector<double> steps;
  std::ifstream lines(run_dir + "/metrics.jsonl");
  for (std::string line; std::getline(lines, line);)
    steps.push_back(nlohmann::json::parse(line).at("step_s").get<double>());
  LOCKSTEP_CHECK(steps.size() == kSteps) << steps.size() << " steps in " << run_dir;
  steps.erase(steps.begin(), steps.begin() + kDropped);
  std::nth_element(steps.begin(), steps.begin() + static_cast<int64_t>(steps.size() / 2), steps.end());
  return {steps[steps.size() / 2], bytes / kSteps};
}

void print_hidden(const std::string& folder, const Case& which) {
  const auto run_dir = [&](const char* link, int round) {
    return folder + "/" + which.name() + link + std::to_string(round);
  };
  for (int round = 0; round < kRounds; ++round) {
    const Measured plain = measure(run_dir("-plain", round), which, 0);
    const double communication_s = kShareOfCompute * plain.step_s;
    const Measured slow =
        measure(run_dir("-slow", round), which, 1e9 * communication_s / static_cast<double>(plain.bytes));
    std::printf(
        "ZeRO-%d, %lld micro-batches: step %.1f ms, with %.1f ms of communication (%.1f MB) %.1f ms: hidden %.0f %%\n",
        which.zero_stage, static_cast<long long>(which.micro_batches), 1e3 * plain.step_s, 1e3 * communication_s,
        1e-6 * static_cast<double>(plain.bytes), 1e3 * slow.step_s,
        100 * (1 - (slow.step_s - plain.step_s) / communication_s));
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  std::string folder = argc > 2 ? argv[2] : "";
  std::string scratch = std::filesystem::temp_directory_path() / "overlap.XXXXXX";
  if (folder.empty()) folder = mkdtemp(scratch.data()) ? scratch : "overlap";
  bool is_known = false;
  for (const lockstep::Case& which : lockstep::kCases) {
    if (!wanted.empty() && which.name() != wanted) continue;
    lockstep::print_hidden(folder, which);
    is_known = true;
  }
  if (argc <= 2) std::filesystem::remove_all(folder);
  return is_known ? 0 : 78;
}
