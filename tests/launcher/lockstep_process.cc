#include "lockstep_process.h"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

namespace lockstep {
namespace {

std::string temporary_file() {
  std::string path = testing::TempDir() + "/lockstep_said_XXXXXX";
  const int file = mkstemp(path.data());
  if (file < 0) throw std::runtime_error("no temporary file at " + path);
  ::close(file);
  return path;
}

bool runs(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  if (!std::getline(file, line)) return false;
  return line[line.rfind(')') + 2] != 'Z';
}

}  // namespace

bool becomes_true(double seconds, const std::function<bool()>& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

// Files, not pipes: a rank that outlives its launcher must not keep the test waiting for the end of its output.
LockstepProcess::LockstepProcess(const std::vector<std::string>& words, const std::map<std::string, std::string>& env)
    : out_path_(temporary_file()), err_path_(temporary_file()) {
  const std::string program = LOCKSTEP_BINARY_DIR "/bin/lockstep";
  std::vector<char*> argv{const_cast<char*>(program.c_str())};
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  pid_ = ::fork();
  if (pid_ < 0) throw std::runtime_error("cannot fork");
  if (pid_ == 0) {
    ::dup2(::open(out_path_.c_str(), O_WRONLY | O_APPEND), STDOUT_FILENO);
    ::dup2(::open(err_path_.c_str(), O_WRONLY | O_APPEND), STDERR_FILENO);
    for (const auto& [name, value] : env) ::setenv(name.c_str(), value.c_str(), 1);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
}

LockstepProcess::~LockstepProcess() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    wait();
  }
  ::unlink(out_path_.c_str());
  ::unlink(err_path_.c_str());
}

void LockstepProcess::send(int signal) const { ::kill(pid_, signal); }

void LockstepProcess::kill_child() const {
  std::ifstream file("/proc/" + std::to_string(pid_) + "/task/" + std::to_string(pid_) + "/children");
  if (pid_t child = 0; file >> child) ::kill(child, SIGKILL);
}

int LockstepProcess::open_files() const {
  const std::filesystem::directory_iterator files("/proc/" + std::to_string(pid_) + "/fd");
  return static_cast<int>(std::distance(begin(files), end(files)));
}

int LockstepProcess::wait() {
  int status = 0;
  while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
  pid_ = -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

std::string LockstepProcess::text_of(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

Ended lockstep_run(const std::vector<std::string>& words, const std::map<std::string, std::string>& env) {
  LockstepProcess process(words, env);
  const int code = process.wait();
  return {code, process.out(), process.err()};
}

std::optional<std::vector<pid_t>> wait_for_ranks(const std::string& folder, int ranks) {
  std::vector<pid_t> pids;
  const bool all = becomes_true(20, [&] {
    pids.clear();
    for (int rank = 0; rank < ranks; ++rank) {
      std::ifstream file(folder + "/pid." + std::to_string(rank));
      if (pid_t pid = 0; file >> pid) pids.push_back(pid);
    }
    return pids.size() == static_cast<size_t>(ranks);
  });
  return all ? std::optional(pids) : std::nullopt;
}

bool are_gone(const std::vector<pid_t>& pids, double seconds) {
  return becomes_true(seconds, [&] {
    for (const pid_t pid : pids) {
      if (runs(pid)) return false;
    }
    return true;
  });
}

std::set<std::string> listening_ports() {
  std::set<std::string> found;
  for (const char* table : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    std::ifstream file(table);
    std::string line, number, here, there, state, queues, timer, retransmits;
    std::getline(file, line);  // the heading
    while (std::getline(file, line)) {
      uid_t owner = 0;
      std::istringstream(line) >> number >> here >> there >> state >> queues >> timer >> retransmits >> owner;
      if (state == "0A" && owner == ::geteuid()) found.insert(here);
    }
  }
  return found;
}

std::set<std::string> mapped_segments(const std::vector<pid_t>& pids) {
  std::set<std::string> found;
  for (const pid_t pid : pids) {
    std::ifstream file("/proc/" + std::to_string(pid) + "/maps");
    for (std::string line; std::getline(file, line);) {
      if (const auto at = line.find("/dev/shm/"); at != std::string::npos) found.insert(line.substr(at));
    }
  }
  return found;
}

}  // namespace lockstep
