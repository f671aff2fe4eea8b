#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace lockstep {

/// What a child process did.
struct AuditedRun {
  int exit_code = -1;               ///< -1: a signal ended it
  int64_t peak_rss_bytes = 0;       ///< by the kernel's count
  std::vector<std::string> opened;  ///< where each file that it opened really is: the kernel's own word, links resolved
};

/// Runs `body` in a child that is traced (ptrace, stopped by a seccomp filter at calls that open files) and exits with
/// what it returns.
/// @return nothing where this system lets no process trace another.
std::optional<AuditedRun> audit_opens(const std::function<int()>& body);

}  // namespace lockstep
