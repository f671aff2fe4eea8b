#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/sharding/shard_layout.h>

namespace lockstep::checkpoint {

/// The safetensors name of a dtype: "F32", "BF16", "I64", ... @throws CheckFailed for one that cannot be stored.
std::string dtype_name(at::ScalarType type);

/// Makes this start the owner of the run directory: creates epoch/E with E = highest + 1. Collective.
/// @throws Fenced when an earlier start still lives (same host: its process exists; another host: its heartbeat moves
/// while we watch),
///         unless `take_over`.
uint64_t acquire_epoch(Fs& fs, ProcessGroup& world, const std::string& run_dir, bool take_over);
/// Signs off: the next start need not wait. Rank 0, at the orderly end.
void release_epoch(Fs& fs, const std::string& run_dir, uint64_t epoch);
/// Shows a starter on another host that we live. Rank 0, now and then.
void beat(Fs& fs, const std::string& run_dir, uint64_t epoch, uint64_t count);

/// One tensor of the state on this rank: its global layout and the box that lives here (numel 0 where this rank holds
/// nothing).
struct StateTensor {
  std::string section;  ///< "weights" or an optimizer state's kind ("exp_avg", ...): digests are per section family
  ShardLayout layout;
  at::Tensor local;  ///< contiguous, CPU or GPU
};

/// Everything else a resume needs, equal on all ranks; goes into the manifest.
struct Progress {
  int64_t step = 0;  ///< steps finished
  int64_t samples = 0;
  std::string config_json;  ///< resolved flags that decide the bits (semantic keys), for the diff on resume
  std::string record_json;  ///< versions, mesh, hosts, CPU capability, threads per rank
  std::string data_fingerprint;
};

struct Options {
  std::string run_dir;    ///< checkpoints lie in its checkpoints/
  int64_t keep_last = 3;  ///< >= 2
  uint64_t epoch = 1;     ///< fencing epoch of this start
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
};

/// Writes and reads checkpoints by the protocol in README.md, files as in checkpoint/format/FORMAT.md. No planning
/// collectives: each rank derives the plan from the layouts. Collective over `world`: all members.
class Store {
 public:
  Store(Fs& fs, ProcessGroup& world, Options options);

  /// Saves; returns when durable (all fsyncs done) on every rank. @return false when some rank failed: nothing of the
  /// attempt is left, training may go on; the reason is logged on the rank that failed. @throws Fenced a newer start
  /// owns the run.
  bool save(const Progress& progress, const std::vector<StateTensor>& state);

  /// Loads the newest good checkpoint into `state`'s tensors, every byte verified in the buffer handed to them; falls
  /// back to older ones together on all ranks, loudly. @return nullopt when the directory holds no checkpoint at all.
  /// @throws CorruptData when there are checkpoints but none is good (never a silent fresh start). @throws ConfigError
  /// a tensor is missing or has another shape, with a diff.
  std::optional<Progress> load_newest(const std::vector<StateTensor>& state);

  /// Loads one checkpoint folder given by path. `weights_only`: other sections are left as they are.
  Progress load(const std::string& path, const std::vector<StateTensor>& state, bool weights_only = false);

  double last_save_seconds() const { return last_save_seconds_; }

 private:
  void write_own_shard(const std::string& directory, const std::vector<StateTensor>& state);
  void commit(const std::string& directory, const Progress& progress, const std::vector<StateTensor>& state);
  void abandon(const std::string& directory);
  void retire_old();
  void check_not_fenced();
  void read_into(const std::string& path, const std::vector<StateTensor>& state, bool weights_only, Progress& progress);
  std::string checkpoints() const { return options_.run_dir + "/checkpoints"; }

  Fs& fs_;
  ProcessGroup& world_;
  Options options_;
  int64_t parent_step_ = -1;
  double last_save_seconds_ = 0;
};

}  // namespace lockstep::checkpoint
