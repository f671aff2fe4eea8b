#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <sys/types.h>

namespace lockstep {

/// What /proc/PID/stat tells of a process (proc(5)).
struct ProcessStat {
  char state = '?';         ///< R running, S sleeping, D in the kernel, T stopped, t traced, Z dead
  uint64_t start_time = 0;  ///< in clock ticks since boot: with the pid, what tells two processes apart
};

/// nullopt: there is none.
std::optional<ProcessStat> read_stat(pid_t pid);
/// `start_time` as the kernel writes it; empty for none, and for a zombie, which does nothing more.
std::string start_time_of(pid_t pid);
/// The kernel function it sleeps in; empty where the kernel does not say.
std::string read_wchan(pid_t pid);
/// Of the pid namespace of this process; 0 where there is no /proc.
uint64_t pid_namespace();

/// A crash of this process, and of those it starts, leaves no core file: it would hold weights and keys.
void forbid_core_dumps();
/// Where the kernel puts one: core_pattern, core(5).
std::string core_pattern();

}  // namespace lockstep
