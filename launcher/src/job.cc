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

#include "machine.h"
#include "stop_signals.h"

namespace lockstep::launcher {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kWithoutHosts{500};  // those that are left are told, the others do not matter
constexpr std::chrono::seconds kMpirunEnds{5};  // TERM to mpirun: its ranks are gone after 2 s (measured, 4.1 and 5.0)

// Ours say that they are ready within a second or two; a program that never says so must not wait for long.
constexpr std::chrono::seconds kSaysReady{10};

class Process {
 public:
  explicit Process(const Job& job) : job_(job), started_(Clock::now()) {
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
        end_orphans();
        return status;
      }
      act_on_signals();
      act_on_watch();
      const int told = job_.watch && !ended_by_watch_ ? job_.watch->fd() : -1;
      std::array<pollfd, 3> watched{{{errors_.get(), POLLIN, 0},  // poll passes over negative ones
                                     {pidfd_.get(), POLLIN, 0},
                                     {told, POLLIN, 0}}};
      ::poll(watched.data(), watched.size(), pidfd_.get() < 0 ? 5 : asked_ && !told_ ? 20 : 100);
      relay();
    }
  }
  bool asked() const { return asked_; }
  bool ended_by_us() const { return terminated_ && !ended_by_watch_; }
  bool ended_by_watch() const { return ended_by_watch_; }
  FailureScan scan() { return std::move(scan_); }

 private:
  [[noreturn]] void become_program(pid_t parent, int errors) const {
    ::setpgid(0, 0);  // Ctrl-C reaches the launcher alone; it turns it into a request to save
    ::prctl(PR_SET_PDEATHSIG, ending_signal());  // when the launcher dies
    if (::getppid() != parent) ::_exit(static_cast<int>(ExitCode::kRunAgain));
    ::signal(SIGPIPE, SIG_DFL);  // ignored ones are inherited
    for (const auto& [name, value] : job_.environment) ::setenv(name.c_str(), value.c_str(), 1);
    if (errors >= 0) ::dup2(errors, STDERR_FILENO);
    if (::isatty(STDIN_FILENO)) {  // a background group that reads its terminal is stopped
      const int null = ::open("/dev/null", O_RDONLY);
      ::dup2(null, STDIN_FILENO);
    }
    const std::vector<char*> argv = argv_of(job_.command);
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

  /// mpirun may end a moment before its ranks do (after MPI_Abort; 5.0 killed: for ever), and a program may leave
  /// something behind. As their subreaper we inherit them: the next start must not meet one that still writes.
  /// Those that watch the ranks from outside get a moment to write down what they saw.
  static void end_orphans() {
    constexpr std::chrono::milliseconds kWatchersEnd{500};
    const Clock::time_point start = Clock::now();  // one that waits for a dead disk cannot be ended
    for (pid_t done = 0; done >= 0 && Clock::now() < start + kMpirunEnds;) {
      done = ::waitpid(-1, nullptr, WNOHANG);
      if (done != 0) continue;
      std::ifstream children("/proc/self/task/" + std::to_string(::getpid()) + "/children");
      const bool is_over = Clock::now() >= start + kWatchersEnd;
      for (pid_t child = 0; is_over && children >> child;) ::kill(child, SIGKILL);
      ::poll(nullptr, 0, 2);
    }
  }

  /// Whether USR1 finds a handler, as far as one can know.
  bool may_tell(Clock::time_point now) const {
    return job_.records.is_ready() || stop_requests() > 1 || now >= started_ + kSaysReady ||
           now + job_.grace / 2 >= deadline_;
  }

  void act_on_signals() {
    const Clock::time_point now = Clock::now();
    if (stop_requests() > 0 && !asked_) {
      asked_ = true;
      deadline_ = now + job_.grace;
    }
    if (asked_ && !told_ && may_tell(now)) {
      told_ = true;
      std::cerr << "lockstep: asked the ranks to save and stop; " << job_.grace.count()
                << " s of grace, Ctrl-C to end them at once" << std::endl;
      ::kill(pid_, SIGUSR1);
    }
    if (asked_ && !terminated_ && (stop_is_urgent() || now >= deadline_)) {
      std::cerr << "lockstep: ending the ranks" << std::endl;
      end_ranks(now + kMpirunEnds);
    } else if (terminated_ && now >= deadline_) {
      ::kill(-pid_, SIGKILL);
    }
  }

  void act_on_watch() {
    if (!job_.watch || terminated_) return;
    const JobWatch::Advice advice = job_.watch->look();
    if (advice == JobWatch::Advice::kGoOn) return;
    ended_by_watch_ = true;
    const bool waits_in_vain = advice == JobWatch::Advice::kEndWithoutHosts;
    end_ranks(Clock::now() + (waits_in_vain ? kWithoutHosts : std::chrono::milliseconds(kMpirunEnds)));
  }

  /// Lets mpirun end its ranks and remove its files of /dev/shm; a lone program just ends. Not TERM, which does the
  /// same but is blocked in a script of `submit`.
  int ending_signal() const { return job_.under_mpirun ? SIGINT : SIGKILL; }

  void end_ranks(Clock::time_point deadline) {
    terminated_ = true;
    deadline_ = deadline;
    ::kill(-pid_, ending_signal());
    ::kill(-pid_, SIGCONT);  // one that is stopped could not end
  }

  const Job& job_;
  pid_t pid_ = -1;
  UniqueFd errors_, pidfd_;
  bool asked_ = false, told_ = false, terminated_ = false, ended_by_watch_ = false;
  Clock::time_point started_, deadline_{};
  FailureScan scan_;
};

}  // namespace

JobEnd run_job(const Job& job) {
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  Process process(job);
  const int status = process.wait();
  return {status, process.asked(), process.ended_by_us(), process.ended_by_watch(), process.scan()};
}

}  // namespace lockstep::launcher
