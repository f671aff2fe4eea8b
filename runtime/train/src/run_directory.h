#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/train/options.h>

namespace lockstep::train {

/// Makes sure the run directory is there, ours and writable, with checkpoints/ and logs/ inside; rank 0 works, all
/// wait. Sets, on every rank, who else may read what is made from now on.
/// @throws ConfigError with the mend when it cannot be made or written.
void prepare_run_directory(Fs& fs, ProcessGroup& world, const std::string& run_dir, Share share = Share::kNone);

/// What the ledger knows of a run's checkpoints.
struct RunHistory {
  std::set<std::pair<uint64_t, int64_t>> durable;  ///< (epoch, step)
  uint64_t first_epoch = 0;                        ///< of the start that the present line of steps began with
  std::string from;                                ///< the checkpoint it began with, by --resume=PATH; empty: step 0
};
/// @throws CorruptData the ledger's chain is broken.
RunHistory read_history(Fs& fs, const std::string& run_dir);

/// The verdicts of the hang watchdog (RUN_DIR/hang-*.json) that the ledger does not have yet, as fields of a "hang"
/// event each. The ledger has one writer, so those who write verdicts leave them to the next start. Files that are no
/// verdicts are passed over.
/// @throws CorruptData the ledger's chain is broken.
std::vector<std::string> new_hangs(Fs& fs, const std::string& run_dir);

/// The keys in which two configurations differ, one "key: was A, now B" each, leaving out accepted ones.
std::string config_difference(const std::string& was_json, const std::string& now_json,
                              const std::vector<std::string>& accepted);

}  // namespace lockstep::train
