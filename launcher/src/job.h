#pragma once

#include <chrono>
#include <map>
#include <string>
#include <vector>

#include <lockstep/base/launch_records.h>

#include "failure_scan.h"

namespace lockstep::launcher {

/// Looks at a job while it runs, in the same thread.
class JobWatch {
 public:
  enum class Advice {
    kGoOn,
    kEnd,              ///< it has to end now
    kEndWithoutHosts,  ///< and mpirun would wait for hosts that do not answer
  };
  virtual ~JobWatch() = default;
  virtual int fd() const = 0;  ///< readable: there is something to look at
  virtual Advice look() = 0;   ///< ten times a second at least. Never waits.
};

/// One start of a program, alone or under mpirun.
struct Job {
  std::vector<std::string> command;  ///< argv; the first word is a path
  bool under_mpirun = false;
  std::chrono::seconds grace{30};                  ///< from a request to stop until the ranks are ended
  std::map<std::string, std::string> environment;  ///< set for it, over what this process has
  LaunchRecords records{""};                       ///< where its ranks say that they are ready
  JobWatch* watch = nullptr;                       ///< may be none
};

/// How it ended, not yet judged (verdict.h).
struct JobEnd {
  int status = 0;                ///< waitpid's, of the program or of mpirun
  bool was_asked = false;        ///< by a signal to this process
  bool was_ended_by_us = false;  ///< after the grace
  bool was_ended_by_watch = false;
  FailureScan scan;  ///< what it said on standard error
};

/// Runs it to its end. Requests to stop (stop_signals.h) ask the ranks to save and stop: USR1 to mpirun, which hands it
/// to every rank; TERM would have them killed 2 s later. USR1 ends a rank that has no handler yet, so it is held back
/// until the ranks said that they are ready. A program that has not said so 10 s after its start is taken for one
/// that never will, and asked anyway; so is one when somebody asks again, or half of the grace is over. An urgent
/// request, or the end of the grace, ends the ranks.
///
/// What ranks write to standard error goes through here unchanged, as it comes; standard output is inherited.
/// Neither mpirun nor ranks outlive this process, even when it is killed, nor this call.
/// Threads: one at a time in a process; stop signals are installed.
/// @throws ConfigError no process can be made.
JobEnd run_job(const Job& job);

}  // namespace lockstep::launcher
