#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "hosts.h"

namespace lockstep::launcher {

/// What `lockstep run` was asked for.
struct Plan {
  std::vector<std::string> program;  ///< path and arguments
  std::string mpirun;                ///< path; empty: one rank, which needs none
  std::vector<Host> hosts;           ///< in order; those beyond `ranks` are spares
  bool on_this_machine = true;       ///< all of them
  bool in_slurm = false;
  int64_t ranks = 1;
  int64_t min_ranks = 1;  ///< as few are enough when hosts are lost
  int64_t restarts = 3;
  std::chrono::seconds grace{30};
  bool tag_output = false, bind_to_cores = false;
  int cores = 1;        ///< of this machine
  std::string run_dir;  ///< of the program, absolute; empty: not known yet
};

/// Starts the program, and starts it again as the restart policy says, on the hosts that answer then, in the largest
/// world that the program accepts. Between two starts no process, no file of Open MPI and no record of the first is
/// left on this machine. @return the exit code of DESIGN 4.
int supervise(const Plan& plan);

}  // namespace lockstep::launcher
