#pragma once

#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/format/fencing.h>
#include <lockstep/format/manifest.h>
#include <lockstep/sharding/shard_layout.h>

namespace lockstep::format {
class Reader;
}

namespace lockstep::checkpoint {

class Staging;
struct Verdict;

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
  std::string run_dir;                                 ///< checkpoints lie in its checkpoints/
  int64_t keep_last = 3;                               ///< >= 2: one to fall back to
  int64_t keep_every_steps = 0;                        ///< those of steps that it divides never go; 0: none
  uint64_t epoch = 1;                                  ///< fencing epoch of this start
  Milliseconds timeout = std::chrono::minutes(30);     ///< for waiting at the slowest rank's storage
  bool check_plan = false;                             ///< compare the ranks' plans before each save: for finding bugs
  int read_threads = 1;                                ///< that read at once on a rank
  Milliseconds slow_after = std::chrono::seconds(60);  ///< a save that takes longer is told of, with its bytes/s
  /// Where Fs::shows_late(), a load looks for so long for files that are not there before they count as lost; half of
  /// `timeout` at most, as the other ranks wait.
  Milliseconds late_names = std::chrono::seconds(60);
  bool sha256 = false;  ///< saves put each shard's SHA-256 into the manifest, for `lockstep verify --expect_sha256`
  /// (epoch, step) of checkpoints that were durable once, as the run's ledger has it (rank 0's count). One that is
  /// there without its MANIFEST is damaged, not unfinished: it stays; and with none left to load there is no fresh
  /// start.
  std::set<std::pair<uint64_t, int64_t>> known_durable = {};
  /// Epoch of the start that this line of steps began with (rank 0's counts): load_newest() passes by what starts
  /// before it have saved.
  uint64_t first_epoch = 0;
  bool trust_foreign = false;  ///< load what belongs to another user too; without, a load of it throws ConfigError
};

/// How a save ended.
struct SaveResult {
  int64_t step = 0;
  bool durable = false;        ///< all fsyncs done on every rank; else nothing is left of it
  double seconds = 0;          ///< from its start until this rank knew
  double stall_seconds = 0;    ///< of them, those in which the caller of this rank was held up
  double storage_seconds = 0;  ///< of them, those in which storage was at work for this rank
};

/// Writes and reads checkpoints by the protocol in README.md, files as in checkpoint/format/FORMAT.md. No planning
/// collectives: each rank derives the plan from the layouts; ranks only agree on how each step went.
///
/// Collective over `world`: all members, with the same layouts in the same order. Threads: one at a time.
class Store {
 public:
  Store(Fs& fs, ProcessGroup& world, Options options);
  ~Store();  ///< waits for what this rank is writing, never for another rank
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  /// Rank 0 does what only the run's owner may, right after it has looked whether it is. Collective.
  /// @throws Fenced on every rank, when a newer start owns the run; what `work` throws, if it is an Error.
  void as_owner(const std::function<void()>& work);

  /// Saves; returns when durable (all fsyncs done) on every rank.
  /// @return false when some rank failed: nothing of the attempt is left, older checkpoints are as they were, training
  ///         may go on; the reason is logged on the rank that failed. Also when this start has saved this step before.
  /// @throws Fenced on every rank, when a newer start owns the run. CheckFailed a tensor that does not fit its layout.
  bool save(const Progress& progress, const std::vector<StateTensor>& state);

  /// The same in the background: returns when this rank's part of the state is copied, so that the state may change;
  /// threads of the store's own write the copy while the caller goes on. One save at a time. The copy's memory, as
  /// large as this rank's part, is kept for the next; reserve() makes it beforehand, in the background too.
  /// @return false when it could not begin on some rank, as above. @throws as save().
  bool start_save(const Progress& progress, const std::vector<StateTensor>& state);
  void reserve(const std::vector<StateTensor>& state);
  /// Whether one is under way: equal on all ranks.
  bool is_saving() const { return save_ != nullptr; }
  /// Whether this rank's storage is at work for it. Not collective: when no rank says so, advance_save() does not
  /// block. Also tells, once, of a save that is slow.
  bool is_writing();
  /// Collective: waits until this rank's part is written, agrees with the others, and begins the next part.
  /// @return the result when that was the last part, nullopt when another has begun. @throws Fenced as save().
  std::optional<SaveResult> advance_save();

  /// Loads the newest good checkpoint into `state`'s tensors, every byte verified in the buffer handed to them; falls
  /// back to older ones together on all ranks, loudly, and puts damaged ones in quarantine (a file QUARANTINED in the
  /// folder: later loads pass it by). Removes what earlier starts left unfinished. Any saved layout loads into any
  /// other.
  /// @return nullopt when the directory holds no checkpoint since Options::first_epoch, and none is known to have been
  ///         durable.
  /// @throws CorruptData when there are checkpoints but none is good (never a silent fresh start). ConfigError a tensor
  ///         is missing or has another shape, with a diff; the files are another user's. Error (74) when storage says
  ///         "not now" (too many open files, stale handle, ...): falling back would lose steps that are safe.
  std::optional<Progress> load_newest(const std::vector<StateTensor>& state);

  /// Loads one checkpoint: a folder that holds a MANIFEST, or a run (its newest). `weights_only`: other sections than
  /// "weights" and "buffers" are left as they are. No fall-back: what was asked for, or an exception as above.
  Progress load(const std::string& path, const std::vector<StateTensor>& state, bool weights_only = false);

  const SaveResult& last_save() const { return last_save_; }

 private:
  struct Save;
  bool begin(const Progress& progress, const std::vector<StateTensor>& state, std::launch how);
  void prepare(const std::string& directory);
  void take_boxes(Save& save);
  void write_own_shard(Save& save);
  void commit(const Save& save);
  void abandon(const std::string& directory, const std::string& doing);
  void retire_old();
  bool has_lost_manifest(const format::Candidate& candidate) const;
  void check_not_fenced();
  std::string list_newest_first(bool& any);
  Verdict read(const std::string& path, const std::vector<StateTensor>& state, bool weights_only, Progress& progress);
  std::unique_ptr<format::Reader> open_patiently(const std::string& path) const;
  ProcessGroup& node();
  void check_state(const std::vector<StateTensor>& state) const;
  std::string checkpoints() const { return options_.run_dir + "/checkpoints"; }

  Fs& fs_;
  ProcessGroup& world_;
  Options options_;
  int64_t parent_step_ = -1;
  SaveResult last_save_;
  std::unique_ptr<ProcessGroup> node_;  // the ranks of this machine, from the first load on
  std::vector<int> node_ranks_;         // their ranks in the world
  std::unique_ptr<Staging> staging_;
  std::future<void> upkeep_;    // in the background: room for the first copy, or the removal of old checkpoints
  std::unique_ptr<Save> save_;  // last, like upkeep_: their threads use the rest
};

}  // namespace lockstep::checkpoint
