#include <algorithm>
#include <cmath>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/metrics/endpoint.h>
#include <lockstep/train/options.h>

#include "profile.h"

namespace lockstep::train {
namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw ConfigError(message);
}

std::string num(int64_t value) { return std::to_string(value); }

void resolve_sharding(Options& options) {
  require(options.zero_stage >= 0 && options.zero_stage <= 3,
          "--zero_stage=" + num(options.zero_stage) + " is none of 0 1 2 3");
  require(options.zero_shard_size >= 0, "--zero_shard_size=" + num(options.zero_shard_size) + " must not be negative");
  require(options.zero_shard_size == 0 || options.zero_stage > 0,
          "--zero_shard_size=" + num(options.zero_shard_size) + " with --zero_stage=0: nothing is sharded");
  if (options.zero_stage > 0 && options.zero_shard_size == 0) options.zero_shard_size = options.mesh.data;
  require(options.zero_stage == 0 || options.mesh.data % options.zero_shard_size == 0,
          "--zero_shard_size=" + num(options.zero_shard_size) + " does not divide data-parallel size " +
              num(options.mesh.data));
  require(options.zero_stage < 2 || options.reduction == "ordered",
          "--reduction=" + options.reduction + " with --zero_stage=" + num(options.zero_stage) +
              ": gradients are sharded in the ordered form only");
}

void resolve_experts(const Options& options) {
  const int experts = options.mesh.expert, data = options.mesh.data;
  if (experts == 1) return;
  require(options.num_leaves() % data == 0,
          num(options.num_leaves()) + " micro-batches are no multiple of data-parallel size " + num(data) +
              ", but ranks that share experts run theirs together (--expert_parallel_size=" + num(experts) +
              "). Mend: set --global_batch_size=" +
              num((options.num_leaves() / data + 1) * data * options.micro_batch_size));
  require(options.zero_stage < 2, "--expert_parallel_size=" + num(experts) +
                                      " with --zero_stage=" + num(options.zero_stage) +
                                      ": experts that are shared stay whole on their ranks. " + "Mend: --zero_stage=1");
  require(options.zero_stage == 0 || options.zero_shard_size % experts == 0,
          "--zero_shard_size=" + num(options.zero_shard_size) +
              " is no multiple of --expert_parallel_size=" + num(experts));
}

void resolve_pipeline(Options& options) {
  const bool is_interleaved = options.pipeline_schedule == "interleaved";
  require(is_interleaved || options.pipeline_schedule == "gpipe" || options.pipeline_schedule == "1f1b",
          "--pipeline_schedule=" + options.pipeline_schedule + " is none of gpipe, 1f1b, interleaved");
  if (options.pipeline_chunks == 0) options.pipeline_chunks = is_interleaved && options.mesh.pipeline > 1 ? 2 : 1;
  require(options.pipeline_chunks >= 1, "--pipeline_chunks=" + num(options.pipeline_chunks) + " must be positive");
  require(options.pipeline_chunks == 1 || (is_interleaved && options.mesh.pipeline > 1),
          "--pipeline_chunks=" + num(options.pipeline_chunks) +
              " needs --pipeline_schedule=interleaved and --pipeline_parallel_size of 2 or more");
}

void check_optimizer(const Options& options) {
  const auto check = [](const char* flag, double value) {
    require(value >= 0 && std::isfinite(value),
            std::string("--") + flag + "=" + std::to_string(value) + " must be a finite number, not negative");
  };
  check("learning_rate", options.schedule.learning_rate);
  check("weight_decay", options.weight_decay);
  check("clip_norm", options.clip_norm);
  check("final_learning_rate_fraction", options.schedule.final_fraction);
  check("decay_fraction", options.schedule.decay_fraction);
  require(options.schedule.decay_fraction <= 1,
          "--decay_fraction=" + std::to_string(options.schedule.decay_fraction) + " is more than all steps");
}

void check_watching(const Options& options) {
  require(parse_steps(options.profile_steps).last <= options.steps,
          "--profile_steps=" + options.profile_steps + " ends after --steps=" + num(options.steps));
  require(options.metrics_port >= 0 && options.metrics_port <= 65'535,
          "--metrics_port=" + num(options.metrics_port) + " is none of 0 (no port) to 65535");
  require(metrics::is_address(options.metrics_bind),
          "--metrics_bind=" + options.metrics_bind +
              " is no IPv4 or IPv6 address. Mend: 127.0.0.1 for this host alone, 0.0.0.0 for every interface");
  require(options.metrics_textfile.empty() || options.metrics_textfile.ends_with(".prom"),
          "--metrics_textfile=" + options.metrics_textfile +
              " does not end with .prom: node exporter would not read it. Mend: --metrics_textfile=" +
              options.metrics_textfile + ".prom");
}

}  // namespace

Options resolve(Options options, int world_size) {
  require(options.steps > 0, "--steps=" + num(options.steps) + " must be positive");
  require(options.global_batch_size > 0, "--global_batch_size=" + num(options.global_batch_size) + " must be positive");
  require(options.micro_batch_size >= 0,
          "--micro_batch_size=" + num(options.micro_batch_size) + " must not be negative");
  require(options.threads_per_rank > 0, "--threads_per_rank=" + num(options.threads_per_rank) + " must be positive");
  require(options.keep_checkpoints >= 2,
          "--keep_checkpoints=" + num(options.keep_checkpoints) + " must be at least 2: one to fall back to");
  require(options.keep_every_steps >= 0,
          "--keep_every_steps=" + num(options.keep_every_steps) + " must not be negative");
  require(options.mean_time_between_failures_h > 0, "--mean_time_between_failures_h must be positive");
  require(options.parallel_micro_batches >= 0,
          "--parallel_micro_batches=" + num(options.parallel_micro_batches) + " must not be negative");
  require(options.bucket_bytes > 0, "--bucket_bytes=" + num(options.bucket_bytes) + " must be positive");
  require(options.eval_samples != 0, "--eval_samples=0 evaluates nothing. Mend: --eval_samples=-1 for all of them");
  require(options.runtime.collective_timeout > Milliseconds(0), "--collective_timeout_s must be positive");
  check_optimizer(options);
  require(options.runtime.hang_timeout_s >= 0, "--hang_timeout_s must be positive, or 0: by the steps' length");
  require(options.save_timeout > Milliseconds(0), "--save_timeout_s must be positive");
  require(options.precision == "fp32" || options.precision == "bf16",
          "--precision=" + options.precision + " is neither fp32 nor bf16");
  require(options.reduction == "ordered" || options.reduction == "fast",
          "--reduction=" + options.reduction + " is neither ordered nor fast");
  require(options.replica_check_interval_steps >= 0,
          "--replica_check_interval_steps=" + num(options.replica_check_interval_steps) + " must not be negative");
  check_watching(options);
  require(options.share == "none" || options.share == "group",
          "--share=" + options.share + " is neither none nor group");
  require(!options.run_dir.empty(), "--run_dir is empty: name the folder this run lives in");
  if (options.micro_batch_size == 0) {
    options.micro_batch_size = std::max<int64_t>(1, options.global_batch_size / 8);
    while (options.global_batch_size % options.micro_batch_size) --options.micro_batch_size;
  }
  require(options.global_batch_size % options.micro_batch_size == 0,
          "--global_batch_size=" + num(options.global_batch_size) + " is no multiple of --micro_batch_size=" +
              num(options.micro_batch_size) + ": micro-batches must have one shape. Mend: set --global_batch_size=" +
              num((options.global_batch_size / options.micro_batch_size + 1) * options.micro_batch_size));
  options.mesh = resolve_mesh(options.mesh, world_size);
  require(options.num_leaves() >= options.mesh.data,
          "global batch " + num(options.global_batch_size) + " = " + num(options.num_leaves()) + " micro-batches of " +
              num(options.micro_batch_size) + ", too few for data-parallel size " + num(options.mesh.data) +
              ". Mend: set --global_batch_size=" + num(options.mesh.data * options.micro_batch_size) +
              " or a smaller --micro_batch_size");
  resolve_sharding(options);
  resolve_experts(options);
  resolve_pipeline(options);
  options.schedule.total_steps = options.steps;
  optim::learning_rate_at(options.schedule, 0);  // throws on what it does not know
  return options;
}

std::string config_json(const Options& options, const std::string& task_config_json) {
  const auto& schedule = options.schedule;
  nlohmann::ordered_json json = {
      {"steps", options.steps},
      {"seed", options.seed},
      {"threads_per_rank", options.threads_per_rank},
      {"global_batch_size", options.global_batch_size},
      {"micro_batch_size", options.micro_batch_size},
      {"precision", options.precision},
      {"reduction", options.reduction},
      {"tensor_parallel_size", options.mesh.tensor},
      {"sequence_parallel", options.sequence_parallel && options.mesh.tensor > 1},
      {"context_parallel_size", options.mesh.context},
      {"learning_rate_schedule", schedule.kind},
      {"learning_rate", schedule.learning_rate},
      {"final_learning_rate_fraction", schedule.final_fraction},
      {"warmup_steps", schedule.warmup_steps},
      {"decay_fraction", schedule.decay_fraction},
      {"weight_decay", options.weight_decay},
      {"clip_norm", options.clip_norm},
  };
  const auto task = nlohmann::ordered_json::parse(task_config_json);
  for (const auto& [key, value] : task.items()) json["task." + key] = value;
  return json.dump();
}

}  // namespace lockstep::train
