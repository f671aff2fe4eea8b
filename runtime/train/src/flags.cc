#include <cstdlib>
#include <sstream>

#include <gflags/gflags.h>

#include <lockstep/base/command_line.h>
#include <lockstep/base/error.h>
#include <lockstep/base/rank_info.h>
#include <lockstep/train/flags.h>

DEFINE_string(run_dir, lockstep::kDefaultRunDir,
              "folder of this run: checkpoints, metrics, logs; created, mode 0700 (see --share)");
DEFINE_int64(steps, 1000, "optimizer updates in all, resumed ones included");
DEFINE_uint64(seed, 1, "seed of weights, data order and dropout");
DEFINE_string(device, "auto", "auto | cpu | cuda; auto is cpu so far");
DEFINE_string(backend, "auto", "auto | shm | mpi | nccl; auto: nccl on GPUs; on CPUs shm inside a node, mpi across");
DEFINE_int32(threads_per_rank, 1,
             "threads inside one micro-batch's operators; part of the arithmetic, so fixed for a run");
DEFINE_int32(
    parallel_micro_batches, 0,
    "micro-batches a rank computes at once, --threads_per_rank threads each; 0: as cores allow. Does not change bits");
DEFINE_string(train_data, "", "training files, a path or glob");
DEFINE_string(validation_data, "", "validation files, a path or glob; empty: none");
DEFINE_int64(global_batch_size, 32, "samples an update, over all ranks");
DEFINE_int64(micro_batch_size, 0,
             "samples a forward and backward; 0: an eighth of the global batch. Part of the arithmetic");
DEFINE_int32(data_parallel_size, 0, "replicas; 0: all ranks");
DEFINE_int32(
    zero_stage, 0,
    "sharded over data-parallel ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters. Does "
    "not change bits");
DEFINE_int32(zero_shard_size, 0, "ranks a replica is sharded over, neighbours; 0: all data-parallel ranks");
DEFINE_int32(tensor_parallel_size, 1,
             "ranks that a layer's products are cut over, neighbours. Changes bits (rounding)");
DEFINE_bool(sequence_parallel, false,
            "with --tensor_parallel_size: norms, dropout and residuals are cut along the sequence too");
DEFINE_int32(context_parallel_size, 1, "ranks that a sequence is cut over. Changes bits (rounding)");
DEFINE_int32(expert_parallel_size, 1,
             "ranks that the experts of a mixture are shared by; divides --data_parallel_size. Does not change bits");
DEFINE_int32(pipeline_parallel_size, 1, "stages that the model's layers are cut into, a rank (or group of ranks) each");
DEFINE_string(pipeline_schedule, "1f1b", "gpipe | 1f1b | interleaved. Does not change bits");
DEFINE_int32(pipeline_chunks, 0, "pieces that a stage's layers come in; 0: 2 for interleaved, else 1");
DEFINE_string(pipeline_split, "", "layers of each piece in order, e.g. 3,4,4,1; empty: pieces of like cost");
DEFINE_string(recompute, "none",
              "none | selective | full: what backward makes again instead of keeping. Does not change bits");
DEFINE_int64(bucket_bytes, 25 << 20, "gradients sent together, in bytes; does not change bits");
DEFINE_string(precision, "fp32", "fp32 | bf16 (autocast; parameters and sums stay fp32)");
DEFINE_string(reduction, "ordered", "ordered (same bits on any number of ranks) | fast (the back end's own order)");
DEFINE_double(learning_rate, 1e-3, "peak learning rate");
DEFINE_int64(warmup_steps, 0, "steps of linear warm-up");
DEFINE_string(learning_rate_schedule, "cosine", "constant | cosine | linear | wsd");
DEFINE_double(final_learning_rate_fraction, 0.1, "last step's rate as a fraction of the peak");
DEFINE_double(decay_fraction, 0.2, "wsd: share of the steps that decays, at the end");
DEFINE_double(weight_decay, 0.1, "decoupled weight decay of matrices");
DEFINE_double(clip_norm, 1.0, "limit of the global gradient norm; 0: off");
DEFINE_int64(checkpoint_interval_steps, -1,
             "steps between checkpoints; 0: only after the last step; -1: as often as pays, by the measured cost of a "
             "save and --mean_time_between_failures_h, at least every 10 minutes");
DEFINE_double(mean_time_between_failures_h, 3, "hours the whole job runs between failures, on average");
DEFINE_bool(checkpoint_initial, false, "also save before the first step: the initial weights as files");
DEFINE_bool(
    asynchronous_save, true,
    "write checkpoints while training goes on, from a copy as large as a rank's part of the state; the last one of "
    "a run is waited for");
DEFINE_bool(checkpoint_sha256, false,
            "put the SHA-256 of each shard into a checkpoint's manifest, for lockstep verify --expect_sha256; made in "
            "the background, 3 s of a core a GB");
DEFINE_int64(keep_checkpoints, 3, "checkpoints kept, at least 2");
DEFINE_int64(keep_every_steps, 0, "checkpoints of steps that this divides are kept for good, beside those; 0: none");
DEFINE_double(save_timeout_s, 1800, "seconds a rank waits for the slowest rank's storage before the run gives up");
DEFINE_string(resume, "auto", "auto: newest good checkpoint of --run_dir; never: start over; or a checkpoint's path");
DEFINE_string(init_from, "", "checkpoint to take weights from, at step 0");
DEFINE_string(accept_config_change, "", "comma-separated configuration keys that may differ from the checkpoint's");
DEFINE_bool(take_over, false, "take the run directory from a start that still looks alive");
DEFINE_bool(trust_foreign_checkpoint, false,
            "load checkpoints whose files belong to another user; their owner, epoch and SHA-256 are logged");
DEFINE_string(share, "none",
              "none | group: whether the run directory's group may read what this run writes from now on");
DEFINE_int64(eval_interval_steps, 250, "steps between evaluations; 0: only after the last step");
DEFINE_int64(eval_samples, -1, "validation samples an evaluation; -1: all");
DEFINE_int64(log_interval_steps, 10, "steps between lines where stderr is no terminal");
DEFINE_int32(metrics_port, 0,
             "port at which rank 0 serves /metrics (for Prometheus) and /healthz; 0: none. One that is taken costs a "
             "warning, not the run");
DEFINE_string(metrics_bind, "127.0.0.1",
              "address of --metrics_port, IPv4 or IPv6; whoever reaches it can read the figures");
DEFINE_string(
    metrics_textfile, "",
    "the same figures without a port: PATH.prom, rewritten every 5 s for the textfile collector of Prometheus' "
    "node exporter; empty: none");
DEFINE_string(profile_steps, "",
              "A:B: writes what every rank does in steps A to B, counted as in metrics.jsonl, to "
              "RUN_DIR/traces/step-A-B.json (chrome://tracing, Perfetto); empty: nothing");
DEFINE_int64(replica_check_interval_steps, 100,
             "steps in which everything that several ranks hold is compared once, a part in each step; a rank that "
             "differs ends the run with exit code 79. 0: off. Needs --reduction=ordered");
DEFINE_bool(check_collectives, false,
            "compare across ranks what they must do alike, before they do it: so far, the plan of each checkpoint");
DEFINE_bool(core_dumps, false,
            "leave a core file after a crash; it holds weights and data, so by default there is none");
DEFINE_double(collective_timeout_s, 300, "seconds a collective may take before the run gives up");
DEFINE_double(
    hang_timeout_s, 0,
    "seconds a rank may keep others waiting while it trains before the watchdog names it and ends the run with "
    "exit code 76. 0: 5 times the longest of 100 steps, at least 30; 120 until steps are known. Below "
    "--collective_timeout_s, which knows less");

namespace lockstep::train {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

Recompute recompute_by_name(const std::string& name) {
  if (name == "none") return Recompute::kNone;
  if (name == "selective") return Recompute::kSelective;
  if (name == "full") return Recompute::kFull;
  throw ConfigError("--recompute=" + name + " is none of none, selective, full");
}

}  // namespace

void parse_flags(int argc, char** argv, const char* usage, const char* own_file) {
  const auto leftover = parse_command_line(
      argc, argv, usage, {{"Flags of this program", own_file}, {"Flags of every training program", __FILE__}});
  if (!leftover.empty())
    throw ConfigError("leftover word '" + leftover[0] + "': flags are --name=value. Mend: see --help");
}

Options options_from_flags() {
  Options options;
  options.run_dir = FLAGS_run_dir;
  options.steps = FLAGS_steps;
  options.seed = FLAGS_seed;
  options.runtime.device = FLAGS_device;
  options.runtime.backend = FLAGS_backend;
  options.runtime.hang_timeout_s = FLAGS_hang_timeout_s;
  options.runtime.collective_timeout = Milliseconds(static_cast<int64_t>(FLAGS_collective_timeout_s * 1000));
  options.threads_per_rank = FLAGS_threads_per_rank;
  options.parallel_micro_batches = FLAGS_parallel_micro_batches;
  options.global_batch_size = FLAGS_global_batch_size;
  options.micro_batch_size = FLAGS_micro_batch_size;
  options.mesh.data = FLAGS_data_parallel_size;
  options.zero_stage = FLAGS_zero_stage;
  options.zero_shard_size = FLAGS_zero_shard_size;
  options.mesh.tensor = FLAGS_tensor_parallel_size;
  options.mesh.context = FLAGS_context_parallel_size;
  options.mesh.expert = FLAGS_expert_parallel_size;
  options.sequence_parallel = FLAGS_sequence_parallel;
  options.mesh.pipeline = FLAGS_pipeline_parallel_size;
  options.pipeline_schedule = FLAGS_pipeline_schedule;
  options.pipeline_chunks = FLAGS_pipeline_chunks;
  options.pipeline_split = FLAGS_pipeline_split;
  options.recompute = recompute_by_name(FLAGS_recompute);
  options.bucket_bytes = FLAGS_bucket_bytes;
  options.precision = FLAGS_precision;
  options.reduction = FLAGS_reduction;
  options.schedule = {.kind = FLAGS_learning_rate_schedule,
                      .learning_rate = FLAGS_learning_rate,
                      .final_fraction = FLAGS_final_learning_rate_fraction,
                      .warmup_steps = FLAGS_warmup_steps,
                      .total_steps = FLAGS_steps,
                      .decay_fraction = FLAGS_decay_fraction};
  options.weight_decay = FLAGS_weight_decay;
  options.clip_norm = FLAGS_clip_norm;
  options.checkpoint_interval_steps = FLAGS_checkpoint_interval_steps;
  options.mean_time_between_failures_h = FLAGS_mean_time_between_failures_h;
  options.checkpoint_initial = FLAGS_checkpoint_initial;
  options.asynchronous_save = FLAGS_asynchronous_save;
  options.checkpoint_sha256 = FLAGS_checkpoint_sha256;
  options.keep_checkpoints = FLAGS_keep_checkpoints;
  options.keep_every_steps = FLAGS_keep_every_steps;
  options.save_timeout = Milliseconds(static_cast<int64_t>(FLAGS_save_timeout_s * 1000));
  options.resume = FLAGS_resume;
  options.init_from = FLAGS_init_from;
  options.accept_config_change = split(FLAGS_accept_config_change);
  options.take_over = FLAGS_take_over;
  const Environment environment = process_environment();  // lockstep run's own name for a job, else the batch system's
  const bool is_ours = environment("LOCKSTEP_JOB_ID").has_value();
  options.job_id = environment(is_ours ? "LOCKSTEP_JOB_ID" : "SLURM_JOB_ID").value_or("");
  const auto start = environment(is_ours ? "LOCKSTEP_JOB_START" : "SLURM_RESTART_COUNT");
  options.job_start = start ? std::strtoll(start->c_str(), nullptr, 10) : 0;
  options.trust_foreign_checkpoint = FLAGS_trust_foreign_checkpoint;
  options.share = FLAGS_share;
  options.core_dumps = FLAGS_core_dumps;
  options.eval_interval_steps = FLAGS_eval_interval_steps;
  options.eval_samples = FLAGS_eval_samples;
  options.log_interval_steps = FLAGS_log_interval_steps;
  options.metrics_port = FLAGS_metrics_port;
  options.metrics_bind = FLAGS_metrics_bind;
  options.metrics_textfile = FLAGS_metrics_textfile;
  options.profile_steps = FLAGS_profile_steps;
  options.check_collectives = FLAGS_check_collectives;
  options.replica_check_interval_steps = FLAGS_replica_check_interval_steps;
  return options;
}

std::string shared_flags() { return resolved_flags({{"", __FILE__}}); }

std::string train_data_flag() { return FLAGS_train_data; }
std::string validation_data_flag() { return FLAGS_validation_data; }

}  // namespace lockstep::train
