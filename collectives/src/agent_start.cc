#include "agent_start.h"

#include <array>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <fcntl.h>
#include <spawn.h>
#include <unistd.h>

#include <lockstep/base/log.h>

namespace lockstep {
namespace {

std::string agent_program() {
  if (const char* named = std::getenv("LOCKSTEP_AGENT")) return named;
  std::array<char, PATH_MAX> path{};
  const ssize_t size = ::readlink("/proc/self/exe", path.data(), path.size() - 1);
  const std::string own(path.data(), size > 0 ? static_cast<size_t>(size) : 0);
  const std::string beside = own.substr(0, own.rfind('/') + 1) + "lockstep";
  return ::access(beside.c_str(), X_OK) == 0 ? beside : "lockstep";  // else as PATH has it
}

int spawn(const std::string& program, std::vector<std::string> words, pid_t& pid) {
  std::vector<char*> argv;
  argv.reserve(words.size() + 1);
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&files);
  posix_spawnattr_init(&attributes);
  // Whoever reads what the ranks say must not wait for the agent to close its end.
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, 1, "/dev/null", O_WRONLY, 0);
  posix_spawn_file_actions_addopen(&files, 2, "/dev/null", O_WRONLY, 0);
  sigset_t all, none;
  sigfillset(&all);
  sigemptyset(&none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK);
  const int error = ::posix_spawnp(&pid, program.c_str(), &files, &attributes, argv.data(), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  return error;
}

}  // namespace

bool wants_agent() { return agent_program() != "none"; }

int start_agent(const std::string& job_key, int local_size) {
  const std::string program = agent_program();
  pid_t pid = -1;
  const int error = spawn(program, {program, "agent", "--job", job_key, "--ranks", std::to_string(local_size)}, pid);
  if (error == 0) return pid;
  LOG(WARNING) << "no hang watchdog: cannot start '" << program << "' (" << std::strerror(error)
               << "). Mend: put lockstep beside this program, or name it in LOCKSTEP_AGENT (none: no watchdog)";
  return -1;
}

}  // namespace lockstep
