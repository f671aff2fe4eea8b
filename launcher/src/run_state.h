#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "restart_policy.h"

namespace lockstep::launcher {

/// The value a program's command line gives a flag, as gflags reads it: --name=value, --name value, --flagfile=F with a
/// flag a line; the last one wins. nullopt: it is not there.
std::optional<std::string> program_flag(const std::vector<std::string>& words, const std::string& name);

/// The program's run directory, absolute: named on its command line, or else what it uses by default, once a run is
/// there. Empty: not known.
std::string program_run_dir(const std::vector<std::string>& words);

/// What a run directory tells about a run, without opening its tensors. Nothing here throws: what cannot be read is
/// not known.
int64_t newest_durable_step(const std::string& run_dir);                ///< -1: none
std::optional<int64_t> last_reported_step(const std::string& run_dir);  ///< of metrics.jsonl, some steps behind
double last_save_seconds(const std::string& run_dir);                   ///< 0: none
double last_step_seconds(const std::string& run_dir);                   ///< 0: none
/// What the steps after `first`, up to `last`, took, in seconds; of a step that was done twice, what it took at last.
double seconds_in_steps(const std::string& run_dir, int64_t first, int64_t last);
/// The ranks whose hosts the ledger's last entry is sure to have found faulty (exit code 79).
std::vector<int64_t> faulty_ranks(const std::string& run_dir);
/// How many processes the kernel has ended for want of memory since this machine was started.
int64_t out_of_memory_kills();

/// What a supervisor knows between two starts, in RUN_DIR/launch/supervisor.json: one that is killed is followed by one
/// that goes on with the same budget. There only while a job is under way.
struct SupervisorState {
  PolicyState policy;
  std::set<int64_t> refused;          ///< world sizes the program does not accept
  std::vector<std::string> excluded;  ///< faulty hosts
  int64_t starts = 0;
  std::string owner;        ///< launcher_name() of who wrote it
  std::string batch_job;    ///< the Slurm job it ran in, if any
  double began_unix_s = 0;  ///< of the first start
  int64_t began_at = -1;    ///< the durable step there was
  std::string job_id;       ///< what the program's starts have in common: a later one need not watch an earlier one
};
std::optional<SupervisorState> load_supervisor_state(const std::string& run_dir);
void save_supervisor_state(const std::string& run_dir, const SupervisorState& state);  ///< a WARNING where it cannot
void remove_supervisor_state(const std::string& run_dir);

}  // namespace lockstep::launcher
