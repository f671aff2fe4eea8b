#include "run_case.h"

#include <array>
#include <filesystem>

#include <lockstep/base/error.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>
#include <lockstep/train/trainer.h>

#include "compare.h"
#include "models.h"

namespace lockstep::fuzz {
namespace {

train::Options options_of(const Case& c, const Layout& layout, const std::string& run_dir) {
  train::Options options;
  options.run_dir = run_dir;
  options.steps = c.steps;
  options.seed = static_cast<uint64_t>(c.seed);
  options.parallel_micro_batches = static_cast<int>(layout.lanes);
  options.global_batch_size = c.leaves * c.micro_batch_size;
  options.micro_batch_size = c.micro_batch_size;
  options.mesh = {.pipeline = static_cast<int>(layout.pipeline),
                  .data = static_cast<int>(layout.data),
                  .context = static_cast<int>(c.context),
                  .tensor = static_cast<int>(c.tensor),
                  .expert = static_cast<int>(layout.expert)};
  options.sequence_parallel = c.sequence_parallel != 0;
  options.zero_stage = static_cast<int>(layout.zero_stage);
  options.zero_shard_size = static_cast<int>(layout.zero_shard_size);
  options.pipeline_schedule = std::array{"1f1b", "gpipe", "interleaved"}.at(layout.schedule);
  options.pipeline_chunks = static_cast<int>(layout.chunks);
  options.pipeline_split = pipeline_split(c, layout);
  options.recompute = std::array{Recompute::kNone, Recompute::kSelective, Recompute::kFull}.at(layout.recompute);
  if (layout.bucket_bytes > 0) options.bucket_bytes = layout.bucket_bytes;
  options.precision = c.bf16 ? "bf16" : "fp32";
  options.reduction = c.fast ? "fast" : "ordered";
  options.schedule = {.kind = "constant", .learning_rate = c.gentle ? 0.005 : c.optimizer == 0 ? 0.05 : 0.01};
  options.clip_norm = std::array{0.0, 1.0, 1e-2}.at(c.clip);
  options.checkpoint_interval_steps = c.resume_at;
  options.keep_checkpoints = 100;
  options.eval_interval_steps = 0;
  options.replica_check_interval_steps = layout.replica_check;
  options.log_interval_steps = 1'000'000;
  return options;
}

class Runs {
 public:
  Runs(const Case& c, std::string work_dir, std::chrono::milliseconds timeout)
      : case_(c), work_dir_(std::move(work_dir)), timeout_(timeout) {}
  ~Runs() {
    std::error_code ignored;
    for (const std::string& run_dir : run_dirs_) std::filesystem::remove_all(run_dir, ignored);
  }
  Runs(const Runs&) = delete;
  Runs& operator=(const Runs&) = delete;

  std::string new_run() {
    run_dirs_.push_back(work_dir_ + "/run" + std::to_string(run_dirs_.size()));
    return run_dirs_.back();
  }

  Outcome train(const Case& c, const Layout& layout, const std::string& run_dir) const {
    train::Options options = options_of(c, layout, run_dir);
    options.runtime.collective_timeout = timeout_;
    double validation_loss = 0;
    run_local_ranks(static_cast<int>(c.ranks(layout)), [&](ProcessGroup& group) {
      const auto task = make_task(c);
      const train::Result result = train::train(group, at::kCPU, *task, options);
      if (group.rank() == 0) validation_loss = result.validation_loss;
    });
    Outcome outcome = read_outcome(run_dir);
    outcome.validation_loss = validation_loss;
    return outcome;
  }

  // As if the run had been stopped after step resume_at.
  void forget_later_steps(const std::string& run_dir) const {
    for (const auto& found : format::list_candidates(real_fs(), run_dir + "/checkpoints")) {
      if (found.step > case_.resume_at) std::filesystem::remove_all(found.path);
    }
  }

 private:
  const Case& case_;
  std::string work_dir_;
  std::chrono::milliseconds timeout_;
  std::vector<std::string> run_dirs_;
};

Verdict differs(const std::string& which, const std::string& text) {
  return text.empty() ? Verdict() : Verdict{Verdict::kDiffers, which + ": " + text};
}

Verdict compare_runs(const Case& c, Runs& runs) {
  const Layout alone;
  Case whole = c;
  whole.resume_at = 0;
  const Outcome uncut = runs.train(whole, alone, runs.new_run());

  const std::string run_dir = runs.new_run();
  const auto check = [&](const char* which, const Outcome& ours) {
    if (c.fast == 0) return differs(which, difference(ours, uncut));
    return c.optimizer == 0 && c.bf16 == 0 ? differs(which, beyond(ours, uncut, kBound)) : Verdict();
  };
  if (Verdict verdict = check("layout", runs.train(c, c.layout, run_dir)); verdict.kind != Verdict::kSame)
    return verdict;
  if (c.resume_at > 0) {
    runs.forget_later_steps(run_dir);
    Verdict verdict = check("resumed", runs.train(c, c.then, run_dir));
    if (verdict.kind != Verdict::kSame) return verdict;
  }
  if (c.tensor * c.context == 1 || c.bf16 || c.optimizer != 0) return {};
  whole.tensor = whole.context = 1, whole.sequence_parallel = 0;
  return differs("tensor and context parallel", beyond(uncut, runs.train(whole, alone, runs.new_run()), kBound));
}

}  // namespace

Verdict run_case(const Case& c, const std::string& work_dir, std::chrono::milliseconds timeout) {
  const PlantedBug planted(c.plant);
  Runs runs(c, work_dir, timeout);
  try {
    return compare_runs(c, runs);
  } catch (const ConfigError& error) {
    return {Verdict::kRefused, error.what()};
  } catch (const CollectiveError& error) {
    return {Verdict::kHung, error.what()};
  } catch (const std::exception& error) {
    return {Verdict::kThrew, error.what()};
  }
}

}  // namespace lockstep::fuzz
