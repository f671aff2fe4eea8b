#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <lockstep/collectives/mesh.h>
#include <lockstep/collectives/runtime.h>
#include <lockstep/optim/schedule.h>
#include <lockstep/sharding/recompute.h>

namespace lockstep::train {

/// What a run is, apart from its task. Filled from the flags of the same names (flags.h), or by hand.
struct Options {
  // run
  std::string run_dir = "run";
  int64_t steps = 1000;
  uint64_t seed = 1;
  RuntimeOptions runtime;
  int threads_per_rank = 1;  ///< intra-op threads of a micro-batch: part of the arithmetic, so fixed for a run
  int parallel_micro_batches =
      0;  ///< micro-batches a rank runs at once, one thread each; 0: spare cores. Bits do not depend on it

  // batch, in samples
  int64_t global_batch_size = 32;
  int64_t micro_batch_size = 0;  ///< 0: an eighth of the global batch, so that runs on 1, 2, 4 and 8 ranks share bits

  // layout
  MeshShape mesh;
  bool sequence_parallel = false;  ///< with tensor parallelism: what lies between its regions is cut along the sequence
  int zero_stage = 0;       ///< sharded over data-parallel ranks: 1 optimizer state, 2 and gradients, 3 and parameters
  int zero_shard_size = 0;  ///< ranks a replica is sharded over, neighbours; 0: all data-parallel ranks
  int pipeline_chunks = 1;  ///< pieces a stage's layers come in; interleaved: at least 2
  std::string pipeline_schedule = "1f1b";  ///< gpipe | 1f1b | interleaved
  std::string pipeline_split;              ///< layers of each piece, "3,4,4,1"; empty: by cost
  Recompute recompute = Recompute::kNone;
  int64_t bucket_bytes = 25 << 20;
  std::string precision = "fp32";     ///< fp32 | bf16 (autocast over f32 parameters)
  std::string reduction = "ordered";  ///< ordered | fast

  // optimizer
  optim::ScheduleOptions schedule;  ///< total_steps is `steps`
  double weight_decay = 0.1;
  double clip_norm = 1.0;  ///< 0: off

  // checkpoint
  int64_t checkpoint_interval_steps = -1;   ///< 0: only the last step; < 0: as often as pays, by what a save costs
  double mean_time_between_failures_h = 3;  ///< of the whole job; how often saving pays depends on it
  bool checkpoint_initial = false;          ///< also before the first step: the initial weights as files
  bool asynchronous_save = true;            ///< those between: written while training goes on, from a copy
  bool checkpoint_sha256 = false;           ///< each shard's SHA-256 in the manifest: lockstep verify --expect_sha256
  int64_t keep_checkpoints = 3;
  int64_t keep_every_steps = 0;          ///< those of steps that it divides are kept for good; 0: none
  Milliseconds save_timeout{1'800'000};  ///< a rank waits so long for the slowest rank's storage
  std::string resume = "auto";           ///< auto | never | PATH
  std::string init_from;                 ///< weights only, step 0
  std::vector<std::string> accept_config_change;
  std::string job_id;     ///< of the job this start belongs to: earlier starts of it are over, wherever they were
  int64_t job_start = 0;  ///< which of its starts this is
  bool take_over = false;
  bool trust_foreign_checkpoint = false;  ///< load checkpoints that belong to another user
  bool core_dumps = false;                ///< whether a crash may leave a core file (run_training.h)
  std::string share = "none";             ///< none | group: who else may read what the run writes

  // watch
  int64_t eval_interval_steps = 250;  ///< <= 0: only after the last step
  int64_t eval_samples = -1;          ///< -1: the whole validation split
  int64_t log_interval_steps = 10;
  bool check_collectives = false;  ///< compare across ranks what they must do alike: so far, plans of checkpoints
  int metrics_port = 0;            ///< metrics/endpoint.h, on rank 0; 0: none
  std::string metrics_bind = "127.0.0.1";
  std::string metrics_textfile;  ///< the same as a file; empty: none
  std::string profile_steps;     ///< "10:12": what all ranks do in these steps goes into traces/step-10-12.json
  int64_t replica_check_interval_steps = 100;  ///< steps in which all that replicas hold is compared once; 0: off

  int64_t num_leaves() const { return global_batch_size / micro_batch_size; }
  int num_shards() const { return zero_stage == 0 ? 1 : zero_shard_size; }  ///< once resolved
};

/// Fills what is derived and checks what can be checked before any work.
/// @throws ConfigError printing both sides of a sum that does not work out, with the mend.
Options resolve(Options options, int world_size);

/// The options that decide the bits of a run, as a JSON object: compared on resume.
std::string config_json(const Options& options, const std::string& task_config_json);

}  // namespace lockstep::train
