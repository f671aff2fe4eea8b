#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <sstream>
#include <thread>

#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <lockstep/base/error.h>

#include "verbs.h"

namespace lockstep::launcher {
namespace {

const std::vector<Arguments::Flag> kFlags = {
    {"n", "RANKS", "ranks to start; default: one for each core"},
    {"mpirun", "PATH", "the mpirun to use; default: the one on PATH"},
    {"grace_s", "SECONDS", "after TERM or INT: time the ranks get to save before they are ended (default 30)"},
};

volatile std::sig_atomic_t g_signals = 0;  // TERM or INT seen so far
void count_signal(int) { g_signals = g_signals + 1; }

int available_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  return sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : 1;
}

// The first of PATH's folders that has an executable `name`; a name with a slash is a path.
std::string find_program(const std::string& name) {
  const auto executable = [](const std::string& path) {
    return ::access(path.c_str(), X_OK) == 0 && std::filesystem::is_regular_file(path);
  };
  if (name.find('/') != std::string::npos) return executable(name) ? name : "";
  const char* path = std::getenv("PATH");
  std::istringstream folders(path ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (executable(folder + "/" + name)) return folder + "/" + name;
  }
  return "";
}

void set_default(const char* name, const std::string& value) { ::setenv(name, value.c_str(), /*overwrite=*/0); }

// What Open MPI should know, by environment: the same names work in 4.x; 5.x reads the PRTE_ ones. Users' own settings
// win.
void prepare_environment(int64_t ranks, int cores) {
  set_default("OMP_NUM_THREADS", "1");
  set_default("OMPI_ALLOW_RUN_AS_ROOT", "1");
  set_default("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
  set_default("OMPI_MCA_rmaps_base_oversubscribe", "1");
  set_default("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
  // Ranks of one host share cores by the kernel's scheduler: Open MPI's default would bind two ranks' helper threads to
  // one core each.
  set_default("OMPI_MCA_hwloc_base_binding_policy", "none");
  set_default("PRTE_MCA_hwloc_default_binding_policy", "none");
  if (ranks > cores)
    set_default("OMPI_MCA_mpi_yield_when_idle", "1");  // a waiting rank must not keep the core from a working one
  // One host: nothing but shared memory is needed, and looking for networks takes time at start.
  set_default("OMPI_MCA_btl", "self,vader");
  set_default("OMPI_MCA_pml", "ob1");
  set_default("OMPI_MCA_plm", "isolated");
}

std::vector<std::string> command_line(const Arguments& arguments, int64_t ranks) {
  if (arguments.rest().empty()) throw ConfigError("no program is named. Mend: lockstep run -n 2 -- PROGRAM FLAGS…");
  const std::string program = find_program(arguments.rest()[0]);
  if (program.empty())
    throw ConfigError("'" + arguments.rest()[0] +
                      "' is not there or cannot be executed. Mend: check the path, or build it");
  std::vector<std::string> command;
  if (ranks > 1) {
    const std::string wanted = arguments.get("mpirun", "mpirun"), mpirun = find_program(wanted);
    if (mpirun.empty())
      throw ConfigError(
          "'" + wanted +
          "' is not there or cannot be executed. Mend: apt-get install openmpi-bin, or pass --mpirun PATH");
    command = {mpirun, "-n", std::to_string(ranks)};
  }
  command.push_back(program);
  command.insert(command.end(), arguments.rest().begin() + 1, arguments.rest().end());
  return command;
}

pid_t start(const std::vector<std::string>& command) {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = ::getpid(), pid = ::fork();
  if (pid < 0) throw ConfigError(std::string("cannot start a process: ") + std::strerror(errno));
  if (pid == 0) {
    ::setpgid(0, 0);                     // Ctrl-C reaches us alone; we turn it into a request to save
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // nothing outlives the launcher
    if (::getppid() != parent) ::_exit(static_cast<int>(ExitCode::kRunAgain));
    ::execv(argv[0], argv.data());
    std::cerr << "lockstep: cannot execute " << argv[0] << ": " << std::strerror(errno) << "\n";
    ::_exit(static_cast<int>(ExitCode::kConfig));
  }
  ::setpgid(pid, pid);
  return pid;
}

// Waits for the job; a first TERM or INT asks the ranks to save and stop (USR1, which mpirun passes on), the end of the
// grace or a second one ends them.
int wait_for(pid_t pid, int64_t grace_s) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point end_at{};
  bool asked = false, ended = false;
  for (;;) {
    int status = 0;
    const pid_t done = ::waitpid(pid, &status, WNOHANG);
    if (done == pid) return status;
    if (g_signals > 0 && !asked) {
      asked = true;
      end_at = Clock::now() + std::chrono::seconds(grace_s);
      std::cerr << "lockstep: asking the ranks to save and stop; " << grace_s
                << " s of grace, again to end them at once\n";
      ::kill(pid, SIGUSR1);
    }
    if (asked && !ended && (g_signals > 1 || Clock::now() > end_at)) {
      ended = true;
      ::kill(-pid, SIGKILL);
    }
    // Sleeping in small steps costs nothing and needs no signal plumbing; a signal ends the sleep early.
    std::array<pollfd, 1> nothing{{{-1, 0, 0}}};
    ::poll(nothing.data(), 0, 5);
  }
}

// DESIGN 4: what a shell would call 128 + signal becomes a code that says what to do next.
int exit_code_of(int status) {
  int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
  if (code > 128 && code < 128 + 32) signal = code - 128;
  switch (signal) {
    case 0:
      return code;
    case SIGKILL:
    case SIGTERM:
    case SIGINT:
    case SIGHUP:
      return static_cast<int>(ExitCode::kRunAgain);
    default:
      return static_cast<int>(ExitCode::kBug);
  }
}

int run(const Arguments& arguments) {
  if (!arguments.words().empty())
    throw ConfigError("leftover word '" + arguments.words()[0] +
                      "'. Mend: put -- before the program: lockstep run -n 2 -- PROGRAM FLAGS…");
  const int cores = available_cores();
  const int64_t ranks = arguments.number("n", cores, 1, 65536), grace_s = arguments.number("grace_s", 30, 0, 86400);
  const auto command = command_line(arguments, ranks);
  prepare_environment(ranks, cores);
  struct sigaction action {};
  action.sa_handler = &count_signal;
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaction(signal, &action, nullptr);
  const pid_t pid = start(command);
  const int code = exit_code_of(wait_for(pid, grace_s));
  ::kill(-pid, SIGKILL);  // whatever of the group is left
  if (code != 0)
    std::cerr << "lockstep: the job ended with exit code " << code
              << (code == static_cast<int>(ExitCode::kRunAgain) ? "; run the same command again to go on" : "") << "\n";
  return code;
}

}  // namespace

const Verb kRun = {"run", "run [-n RANKS] [--mpirun PATH] [--grace_s 30] -- PROGRAM FLAGS…",
                   "Starts PROGRAM on RANKS ranks of this machine and passes its exit code on.", &kFlags, &run};

}  // namespace lockstep::launcher
