#pragma once

#include <string>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/train/options.h>

namespace lockstep::train {

/// Makes sure the run directory is there, ours and writable, with checkpoints/ and logs/ inside; rank 0 works, all
/// wait.
/// @throws ConfigError with the mend when it cannot be made or written.
void prepare_run_directory(Fs& fs, ProcessGroup& world, const std::string& run_dir);

/// Writes run.json: flags, versions, mesh, hosts, the record of what decides bits. Replaces the one of an earlier
/// start. Rank 0.
void write_run_record(Fs& fs, const std::string& run_dir, const std::string& json);

/// The keys in which two configurations differ, one "key: was A, now B" each, leaving out accepted ones.
std::string config_difference(const std::string& was_json, const std::string& now_json,
                              const std::vector<std::string>& accepted);

}  // namespace lockstep::train
