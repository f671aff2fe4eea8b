#pragma once

#include <functional>
#include <optional>
#include <string>

namespace lockstep {

/// Who this process is in the job, as its launcher's environment says it (MPI has the last word once it is up).
struct RankInfo {
  int rank = 0;
  int world_size = 1;
  int local_rank = 0;
  int local_size = 1;
  int node_rank = 0;              ///< 0 where the launcher does not say (mpirun)
  std::string launcher = "none";  ///< "lockstep", "mpirun", "torchrun", "srun" or "none"
  bool has_mpi = false;           ///< false under torchrun and alone: MPI would only see itself
};

using Environment = std::function<std::optional<std::string>(const char* name)>;
Environment process_environment();

/// Reads LOCKSTEP_*, Open MPI, torchrun and Slurm variables, in that order of trust: the inner launcher wins where one
/// runs inside another (mpirun in an sbatch, torchrun under srun).
/// @throws ConfigError a variable that is no number, out of range, or two that contradict each other; the message names
/// them and says what to do.
RankInfo rank_info_from_environment(const Environment& environment);

/// @throws ConfigError when the environment announces more ranks than MPI sees: N lonely runs would train N times the
/// same thing.
void check_world(const RankInfo& announced, int mpi_rank, int mpi_world_size);

}  // namespace lockstep
