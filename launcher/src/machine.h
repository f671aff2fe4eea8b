#pragma once

#include <string>
#include <vector>

#include <netinet/in.h>

namespace lockstep::launcher {

/// Cores this process may use: its affinity mask, cut down to the cgroup's quota (containers), at least 1.
int usable_cores();
/// Cores of the cgroup's quota (version 2), 0: no limit.
double cgroup_core_quota();

/// The first of PATH's folders that has an executable `name`; a name with a slash is a path. Empty: not found.
std::string find_program(const std::string& name);

/// What exec and posix_spawn take, null at its end. Points into `command`, which must outlive it.
std::vector<char*> argv_of(const std::vector<std::string>& command);

/// What a short command wrote (standard output and error together) and how it ended. No shell is involved.
struct Answer {
  int exit_code = -1;  ///< -1: could not be started or ended by a signal
  std::string output;  ///< 64 KiB at most
};
Answer ask(const std::vector<std::string>& command);

/// Of the clock on the wall.
double unix_seconds();

/// "10.0.0.7".
std::string ipv4_text(in_addr address);

std::string first_line(const std::string& text);

/// "Killed" for 9.
std::string signal_name(int signal);

}  // namespace lockstep::launcher
