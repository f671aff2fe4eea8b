#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <sys/types.h>

namespace lockstep::flight {

/// What /proc/PID/stat tells of a process.
struct ProcessStat {
  char state = '?';         ///< R running, S sleeping, D in the kernel, T stopped, t traced, Z dead
  uint64_t start_time = 0;  ///< field 22: with the pid, what tells two processes apart
};

/// nullopt: there is none.
std::optional<ProcessStat> read_stat(pid_t pid);
/// The kernel function it sleeps in; empty where the kernel does not say.
std::string read_wchan(pid_t pid);
/// Of the pid namespace of this process; 0 where there is no /proc.
uint64_t pid_namespace();

}  // namespace lockstep::flight
