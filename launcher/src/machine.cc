#include "machine.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <arpa/inet.h>
#include <fcntl.h>
#include <sched.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace lockstep::launcher {

double cgroup_core_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string limit;
  double period = 0;
  if (!(file >> limit >> period) || limit == "max" || period <= 0) return 0;
  return std::strtod(limit.c_str(), nullptr) / period;
}

int usable_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  const int cores = sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : 1;
  const double quota = cgroup_core_quota();
  return std::max(1, quota > 0 ? std::min(cores, static_cast<int>(std::floor(quota + 0.01))) : cores);
}

std::string find_program(const std::string& name) {
  const auto executable = [](const std::string& path) {
    std::error_code ignored;
    return ::access(path.c_str(), X_OK) == 0 && std::filesystem::is_regular_file(path, ignored);
  };
  if (name.find('/') != std::string::npos) return executable(name) ? name : "";
  const char* path = std::getenv("PATH");
  std::istringstream folders(path ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');) {
    folder.append("/").append(name);
    if (executable(folder)) return folder;
  }
  return "";
}

std::vector<char*> argv_of(const std::vector<std::string>& command) {
  std::vector<char*> argv;
  argv.reserve(command.size() + 1);
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  return argv;
}

Answer ask(const std::vector<std::string>& command) {
  Answer answer;
  std::array<int, 2> pipe{};
  if (::pipe2(pipe.data(), O_CLOEXEC) != 0) return answer;
  const std::vector<char*> argv = argv_of(command);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, pipe[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, pipe[1], STDERR_FILENO);
  pid_t pid = -1;
  const bool started = ::posix_spawnp(&pid, argv[0], &actions, nullptr, argv.data(), environ) == 0;
  posix_spawn_file_actions_destroy(&actions);
  ::close(pipe[1]);
  std::array<char, 4096> part{};
  for (ssize_t got = 0; started; answer.output.append(part.data(), static_cast<size_t>(got))) {
    got = ::read(pipe[0], part.data(), part.size());
    if (got < 0 && errno == EINTR)
      got = 0;
    else if (got <= 0 || answer.output.size() > (64 << 10))
      break;
  }
  ::close(pipe[0]);
  int status = 0;
  if (started && ::waitpid(pid, &status, 0) == pid && WIFEXITED(status)) answer.exit_code = WEXITSTATUS(status);
  return answer;
}

double unix_seconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string ipv4_text(in_addr address) {
  std::array<char, INET_ADDRSTRLEN> text{};
  ::inet_ntop(AF_INET, &address, text.data(), text.size());
  return text.data();
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string signal_name(int signal) {
  const char* name = ::strsignal(signal);  // NOLINT(concurrency-mt-unsafe): one thread
  return name ? name : "unknown";
}

}  // namespace lockstep::launcher
