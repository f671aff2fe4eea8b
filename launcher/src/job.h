#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace lockstep::launcher {

/// One start of a program, alone or under mpirun, from fork to exit code.
struct Job {
  std::vector<std::string> command;  ///< argv; the first word is a path
  bool under_mpirun = false;
  std::chrono::seconds grace{30};  ///< from a request to stop until the ranks are ended
};

struct JobEnd {
  int exit_code = 0;                         ///< of DESIGN 4
  std::optional<std::string> first_failure;  ///< how the trouble began, if anything said so
};

/// Runs it to its end. TERM, INT, HUP and USR1 to this process ask the ranks to save and stop (USR1 to mpirun, which
/// hands it to every rank: TERM would have them killed 2 s later); an INT after that, or the end of the grace, ends
/// them.
///
/// What ranks write to standard error goes through here unchanged, as it comes; standard output is inherited.
/// Neither mpirun nor ranks outlive this process, even when it is killed.
/// Threads: once at a time in a process (signal handlers).
/// @throws ConfigError no process can be made.
JobEnd run_job(const Job& job);

}  // namespace lockstep::launcher
