#include "job.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fstream>
#include <iostream>

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

#include "failure_scan.h"
#include "machine.h"

namespace lockstep::launcher {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kMpirunEnds{5};  // TERM to mpirun: its ranks are gone after 2 s (measured, 4.1 and 5.0)

volatile std::sig_atomic_t g_stop = 0, g_interrupts = 0;  // what signal handlers may touch
void note_signal(int signal) {
  if (g_stop && signal == SIGINT) g_interrupts = 1;  // only a person says it twice: Slurm sends USR1, then TERM
  g_stop = 1;
}

void install_handlers() {
  struct sigaction action {};
  action.sa_handler = &note_signal;
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaction(signal, &action, nullptr);
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);  // `lockstep run … | head` must not end the training
}

class Process {
 public:
  explicit Process(const Job& job) : job_(job) {
    std::array<int, 2> pipe{-1, -1};
    if (job.under_mpirun && ::pipe2(pipe.data(), O_CLOEXEC) != 0)
      throw ConfigError(std::string("cannot make a pipe: ") + std::strerror(errno));
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) throw ConfigError(std::string("cannot start a process: ") + std::strerror(errno));
    if (pid_ == 0) become_program(parent, pipe[1]);
    ::setpgid(pid_, pid_);
    if (pipe[1] >= 0) ::close(pipe[1]);
    errors_.reset(pipe[0]);
    pidfd_.reset(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));  // -1 where the kernel lacks it: polling then
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() = default;

  /// @return waitpid's status.
  int wait() {
    for (;;) {
      int status = 0;
      if (::waitpid(pid_, &status, WNOHANG) == pid_) {
        while (relay()) {
        }
        ::kill(-pid_, SIGKILL);  // whatever of the group is left
        if (job_.under_mpirun) end_orphans();
        return status;
      }
      act_on_signals();
      std::array<pollfd, 2> watched{
          {{errors_.get(), POLLIN, 0}, {pidfd_.get(), POLLIN, 0}}};  // poll passes over negative ones
      ::poll(watched.data(), watched.size(), pidfd_.get() >= 0 ? 100 : 5);
      relay();
    }
  }
  bool asked() const { return asked_; }
  bool ended_by_us() const { return terminated_; }
  const FailureScan& scan() const { return scan_; }

 private:
  [[noreturn]] void become_program(pid_t parent, int errors) const {
    ::setpgid(0, 0);  // Ctrl-C reaches the launcher alone; it turns it into a request to save
    // When the launcher dies: TERM lets mpirun end its ranks and remove its files of /dev/shm; a lone program just
    // ends.
    ::prctl(PR_SET_PDEATHSIG, job_.under_mpirun ? SIGTERM : SIGKILL);
    if (::getppid() != parent) ::_exit(static_cast<int>(ExitCode::kRunAgain));
    ::signal(SIGPIPE, SIG_DFL);  // ignored ones are inherited
    if (errors >= 0) ::dup2(errors, STDERR_FILENO);
    if (::isatty(STDIN_FILENO)) {  // a background group that reads its terminal is stopped
      const int null = ::open("/dev/null", O_RDONLY);
      ::dup2(null, STDIN_FILENO);
    }
    std::vector<char*> argv;
    argv.reserve(job_.command.size() + 1);
    for (const std::string& word : job_.command) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    ::execv(argv[0], argv.data());
    const std::string message = "lockstep: cannot execute " + job_.command[0] + ": " + std::strerror(errno) +
                                ". Mend: was it built for this machine?\n";
    [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, message.data(), message.size());
    ::_exit(static_cast<int>(ExitCode::kConfig));
  }

  /// Passes on what is there, byte for byte: rank 0's progress line stays alive. @return whether there was anything.
  bool relay() {
    pollfd ready{errors_.get(), POLLIN, 0};
    if (errors_.get() < 0 || ::poll(&ready, 1, 0) <= 0) return false;
    std::array<char, 16384> bytes{};
    const ssize_t got = ::read(errors_.get(), bytes.data(), bytes.size());
    if (got <= 0) {
      if (got < 0 && errno == EINTR) return true;
      errors_.reset();
      return false;
    }
    scan_.feed({bytes.data(), static_cast<size_t>(got)});
    for (ssize_t done = 0; done < got;) {
      const ssize_t written = ::write(STDERR_FILENO, bytes.data() + done, static_cast<size_t>(got - done));
      if (written < 0 && errno != EINTR) break;  // nobody listens any more; the ranks go on
      done += std::max<ssize_t>(written, 0);
    }
    return true;
  }

  /// mpirun may end a moment before its ranks do (after MPI_Abort; 5.0 killed: for ever). As their subreaper we inherit
  /// them: the next start must not meet one that still writes.
  static void end_orphans() {
    const Clock::time_point give_up = Clock::now() + kMpirunEnds;  // one that waits for a dead disk cannot be ended
    for (pid_t done = 0; done >= 0 && Clock::now() < give_up;) {
      done = ::waitpid(-1, nullptr, WNOHANG);
      if (done != 0) continue;
      std::ifstream children("/proc/self/task/" + std::to_string(::getpid()) + "/children");
      for (pid_t child = 0; children >> child;) ::kill(child, SIGKILL);
      ::poll(nullptr, 0, 2);
    }
  }

  void act_on_signals() {
    const Clock::time_point now = Clock::now();
    if (g_stop && !asked_) {
      asked_ = true;
      deadline_ = now + job_.grace;
      std::cerr << "lockstep: asked the ranks to save and stop; " << job_.grace.count()
                << " s of grace, Ctrl-C to end them at once" << std::endl;
      ::kill(pid_, SIGUSR1);
    }
    if (asked_ && !terminated_ && (g_interrupts || now >= deadline_)) {
      terminated_ = true;
      deadline_ = now + kMpirunEnds;
      std::cerr << "lockstep: ending the ranks" << std::endl;
      ::kill(-pid_, job_.under_mpirun ? SIGTERM : SIGKILL);
      ::kill(-pid_, SIGCONT);  // one that is stopped could not end
    } else if (terminated_ && now >= deadline_) {
      ::kill(-pid_, SIGKILL);
    }
  }

  const Job& job_;
  pid_t pid_ = -1;
  UniqueFd errors_, pidfd_;
  bool asked_ = false, terminated_ = false;
  Clock::time_point deadline_{};
  FailureScan scan_;
};

// DESIGN 4: what a shell would call 128 + signal becomes a code that says what to do next.
int exit_code_of(int status, const Process& process) {
  int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
  if (code > 128 && code < 128 + 32) signal = code - 128;  // mpirun says it so
  // mpirun 4.1 ends with 0 when it was told to end its ranks, so its 0 does not mean that they were done.
  if (process.ended_by_us()) return static_cast<int>(ExitCode::kRunAgain);
  switch (signal) {
    case 0:
      // mpirun's own trouble is always 1; a program's 1 is passed on.
      return code == 1 && process.scan().could_not_start() ? static_cast<int>(ExitCode::kConfig) : code;
    case SIGKILL:
    case SIGTERM:
    case SIGINT:
    case SIGHUP:
      return static_cast<int>(ExitCode::kRunAgain);
    case SIGUSR1:  // our request met a rank that had not set its handler yet: nothing to save
      return static_cast<int>(process.asked() ? ExitCode::kRunAgain : ExitCode::kBug);
    default:
      return static_cast<int>(ExitCode::kBug);
  }
}

}  // namespace

JobEnd run_job(const Job& job) {
  g_stop = 0;
  g_interrupts = 0;
  install_handlers();
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  Process process(job);
  const int status = process.wait();
  JobEnd end{exit_code_of(status, process), process.scan().first_failure()};
  if (process.asked() && end.exit_code == static_cast<int>(ExitCode::kRunAgain))
    end.first_failure.reset();  // the ranks did as they were asked
  if (WIFSIGNALED(status) && !job.under_mpirun && !process.ended_by_us())
    end.first_failure =
        "the program died by signal " + std::to_string(WTERMSIG(status)) + " (" + signal_name(WTERMSIG(status)) + ")";
  return end;
}

}  // namespace lockstep::launcher
