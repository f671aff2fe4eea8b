#include "open_audit.h"

#include <array>
#include <cerrno>
#include <csignal>
#include <cstddef>

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace lockstep {
namespace {

constexpr int kCannotTrace = 99;  // of the child, before it does anything

// Stops the tracer's child at each call that opens a file; all others run at full speed.
bool stop_at_opens() {
  constexpr std::array kCalls = {
      SYS_openat, SYS_openat2, SYS_open_by_handle_at,
#ifdef SYS_open
      SYS_open,   SYS_creat,
#endif
  };
  std::vector<sock_filter> filter = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr))};
  for (const long call : kCalls) {
    filter.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(call), 0, 1));
    filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE));
  }
  filter.push_back(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
  const sock_fprog program{static_cast<unsigned short>(filter.size()), filter.data()};
  return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

// The file behind the descriptor that the call the child has just left returned; empty for a call that failed.
std::string opened_file(pid_t child) {
  __ptrace_syscall_info info{};
  if (ptrace(PTRACE_GET_SYSCALL_INFO, child, sizeof(info), &info) <= 0) return "(unknown)";
  if (info.op != PTRACE_SYSCALL_INFO_EXIT || info.exit.rval < 0) return "";
  std::array<char, 4096> path{};
  const std::string link = "/proc/" + std::to_string(child) + "/fd/" + std::to_string(info.exit.rval);
  const ssize_t length = readlink(link.c_str(), path.data(), path.size());
  return length < 0 ? "(unknown)" : std::string(path.data(), static_cast<size_t>(length));
}

}  // namespace

std::optional<AuditedRun> audit_opens(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(kCannotTrace);
    raise(SIGSTOP);  // until the tracer has said what it wants to see
    if (!stop_at_opens()) _exit(kCannotTrace);
    _exit(body());
  }
  AuditedRun run;
  int status = 0;
  rusage usage{};
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) return std::nullopt;
  const long options = PTRACE_O_TRACESECCOMP | PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL;
  if (ptrace(PTRACE_SETOPTIONS, child, nullptr, options) != 0) {
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return std::nullopt;
  }
  for (bool at_open = false;;) {
    long signal = 0;
    if (WIFSTOPPED(status) && status >> 8 == (SIGTRAP | PTRACE_EVENT_SECCOMP << 8)) {
      at_open = true;  // about to enter; the next stop is its end
    } else if (WIFSTOPPED(status) && WSTOPSIG(status) == (SIGTRAP | 0x80)) {
      if (const std::string file = opened_file(child); !file.empty()) run.opened.push_back(file);
      at_open = false;
    } else if (WIFSTOPPED(status) && WSTOPSIG(status) != SIGSTOP) {
      signal = WSTOPSIG(status);
    }
    ptrace(at_open ? PTRACE_SYSCALL : PTRACE_CONT, child, nullptr, signal);
    if (wait4(child, &status, 0, &usage) != child) return std::nullopt;
    if (WIFEXITED(status) || WIFSIGNALED(status)) break;
  }
  run.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  run.peak_rss_bytes = static_cast<int64_t>(usage.ru_maxrss) * 1024;
  if (run.exit_code == kCannotTrace) return std::nullopt;
  return run;
}

}  // namespace lockstep
