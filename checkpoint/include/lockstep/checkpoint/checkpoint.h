#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/format/fencing.h>
#include <lockstep/format/manifest.h>
#include <lockstep/sharding/shard_layout.h>

namespace lockstep::checkpoint {

/// The safetensors name of a dtype: "F32", "BF16", "I64", ... @throws CheckFailed for one that cannot be stored.
std::string dtype_name(at::ScalarType type);

/// Makes this start the owner of the run directory: creates epoch/E with E = highest + 1. Collective.
/// @throws Fenced on every rank, when an earlier start still lives (same boot: its process exists; another host: its
/// heartbeat moves while we watch), unless `starter.take_over`.
uint64_t acquire_epoch(Fs& fs, ProcessGroup& world, const std::string& run_dir, const format::Starter& starter);
uint64_t acquire_epoch(Fs& fs, ProcessGroup& world, const std::string& run_dir, bool take_over);
using format::beat;           ///< rank 0, now and then
using format::release_epoch;  ///< rank 0, at the orderly end

/// One tensor of the state on this rank: its global layout and the box that lives here (numel 0 where this rank holds
/// nothing).
struct StateTensor {
  /// "weights", "buffers", or an optimizer state's kind ("exp_avg", ...): digests are per section family. No ':'.
  std::string section;
  ShardLayout layout;
  at::Tensor local;  ///< CPU or GPU; contiguous on the CPU it is written from and read into in place, without a copy
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
  std::string run_dir;                                   ///< checkpoints lie in its checkpoints/
  int64_t keep_last = 3;                                 ///< >= 2: one to fall back to
  uint64_t epoch = 1;                                    ///< fencing epoch of this start
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;  ///< for waiting at the slowest rank's storage
  /// Names of folders that were durable once, as the run's ledger has it (rank 0's count). One that is there without
  /// its MANIFEST is damaged, not unfinished: it stays; and with none left to load there is no fresh start.
  std::set<std::string> known_durable = {};
};

/// Writes and reads checkpoints by the protocol in README.md, files as in checkpoint/format/FORMAT.md. No planning
/// collectives: each rank derives the plan from the layouts; ranks only agree on how each step went.
///
/// Collective over `world`: all members, with the same layouts in the same order. Threads: one at a time.
class Store {
 public:
  Store(Fs& fs, ProcessGroup& world, Options options);

  /// Saves; returns when durable (all fsyncs done) on every rank.
  /// @return false when some rank failed: nothing of the attempt is left, older checkpoints are as they were, training
  ///         may go on; the reason is logged on the rank that failed. Also when this start has saved this step before.
  /// @throws Fenced on every rank, when a newer start owns the run. CheckFailed a tensor that does not fit its layout.
  bool save(const Progress& progress, const std::vector<StateTensor>& state);

  /// Loads the newest good checkpoint into `state`'s tensors, every byte verified in the buffer handed to them; falls
  /// back to older ones together on all ranks, loudly, and puts damaged ones in quarantine (a file QUARANTINED in the
  /// folder: later loads pass it by). Removes what earlier starts left unfinished. Any saved layout loads into any
  /// other.
  /// @return nullopt when the directory holds no checkpoint at all, and none is known to have been durable.
  /// @throws CorruptData when there are checkpoints but none is good (never a silent fresh start). ConfigError a tensor
  ///         is missing or has another shape, with a diff. Error (74) when storage says "not now" (too many open
  ///         files, stale handle, ...): falling back would lose steps that are safe.
  std::optional<Progress> load_newest(const std::vector<StateTensor>& state);

  /// Loads one checkpoint: a folder that holds a MANIFEST, or a run (its newest). `weights_only`: other sections than
  /// "weights" and "buffers" are left as they are. No fall-back: what was asked for, or an exception as above.
  Progress load(const std::string& path, const std::vector<StateTensor>& state, bool weights_only = false);

  double last_save_seconds() const { return last_save_seconds_; }

 private:
  void prepare(const std::string& directory);
  void write_own_shard(const std::string& directory, const std::vector<StateTensor>& state);
  void commit(const std::string& directory, const Progress& progress, const std::vector<StateTensor>& state);
  void abandon(const std::string& directory, const std::string& doing);
  void retire_old();
  bool has_lost_manifest(const format::Candidate& candidate) const;
  void check_not_fenced();
  std::string list_newest_first(bool& any);
  Progress read_into(const std::string& path, const std::vector<StateTensor>& state, bool weights_only);
  void check_state(const std::vector<StateTensor>& state) const;
  std::string checkpoints() const { return options_.run_dir + "/checkpoints"; }

  Fs& fs_;
  ProcessGroup& world_;
  Options options_;
  int64_t parent_step_ = -1;
  double last_save_seconds_ = 0;
};

}  // namespace lockstep::checkpoint
