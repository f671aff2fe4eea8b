#include "launch_folder.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>

#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/base/process.h>

#include "hosts.h"
#include "secure_channel.h"

namespace lockstep::launcher {
namespace {

namespace files = std::filesystem;
using Clock = std::chrono::steady_clock;

constexpr const char* kSharedMemory = "/dev/shm";

std::string own_host() {
  std::string host = own_name();
  std::replace(host.begin(), host.end(), '.', '_');  // '.' separates
  return host;
}

// lockstep-HOST.PID.STARTED.NAMESPACE.
struct Owner {
  std::string host;
  pid_t pid = 0;
  std::string started, pid_namespace;
};

std::string prefix_of(const Owner& owner) {
  return "lockstep-" + owner.host + "." + std::to_string(owner.pid) + "." + owner.started + "." + owner.pid_namespace +
         ".";
}

Owner myself() { return {own_host(), ::getpid(), start_time_of(::getpid()), std::to_string(pid_namespace())}; }

std::optional<pid_t> parse_pid(const std::string& text) {
  pid_t pid = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), pid);
  const bool is_whole = parsed.ec == std::errc() && parsed.ptr == text.data() + text.size();
  return is_whole && pid > 0 ? std::optional(pid) : std::nullopt;
}

// nullopt: no name of ours.
std::optional<Owner> parse_owner(const std::string& name) {
  std::vector<std::string> parts;
  std::istringstream stream(name);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  constexpr std::string_view kBegin = "lockstep-";
  if (parts.size() != 5 || !name.starts_with(kBegin)) return std::nullopt;
  const auto pid = parse_pid(parts[1]);
  return pid ? std::optional(Owner{parts[0].substr(kBegin.size()), *pid, parts[2], parts[3]}) : std::nullopt;
}

bool is_our_directory(const std::string& path) {
  struct stat status {};
  return ::lstat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == ::geteuid();
}

std::string temporary_folder() {
  const char* named = std::getenv("TMPDIR");
  return named && *named ? named : "/tmp";
}

// A fresh folder of mode 0700; empty where it cannot be made.
std::string make_in(const std::string& parent) {
  std::string path = parent + "/" + prefix_of(myself()) + "XXXXXX";
  return ::mkdtemp(path.data()) ? path : "";
}

void remove_records(const std::string& folder) {
  ::unlink(rendezvous_path(folder).c_str());
  try {
    LaunchRecords(folder).remove();
  } catch (const IoError&) {  // somebody else's now; the next start has a folder of its own
  }
  ::rmdir(folder.c_str());  // stays where somebody left a report in it
}

bool has_word(const std::string& pid, const std::string& word) {  // in its environment
  std::ifstream file("/proc/" + pid + "/environ");                // unreadable for other users' processes
  for (std::string variable; std::getline(file, variable, '\0');) {
    if (variable == word) return true;
  }
  return false;
}

std::vector<pid_t> processes_with(const std::string& word) {
  std::vector<pid_t> found;
  std::error_code error;
  for (files::directory_iterator entry("/proc", error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename();
    const auto pid = parse_pid(name);
    if (pid && *pid != ::getpid() && has_word(name, word) && !start_time_of(*pid).empty()) found.push_back(*pid);
  }
  return found;
}

}  // namespace

std::string launcher_name() { return prefix_of(myself()) + "state"; }

bool is_launcher_here(const std::string& name) {
  const auto owner = parse_owner(name);
  return owner && owner->host == own_host() && owner->pid_namespace == std::to_string(pid_namespace());
}

bool is_dead_launcher(const std::string& name) {
  const auto owner = parse_owner(name);
  return owner && is_launcher_here(name) && start_time_of(owner->pid) != owner->started;
}

LaunchFolder::LaunchFolder(const std::string& run_dir) {
  if (!run_dir.empty()) {
    std::error_code error;
    made_run_dir_ = files::create_directories(run_dir, error);  // 0700 by the umask
    run_dir_ = files::absolute(run_dir, error).string();
    for (int tries = 0; records_.empty() && tries < 3; ++tries) {  // another launcher may remove launch/ meanwhile
      ::mkdir((run_dir_ + "/launch").c_str(), 0700);
      records_ = make_in(run_dir_ + "/launch");
    }
  }
  session_ = make_in(temporary_folder());
  shared_memory_ = make_in(kSharedMemory);  // else Open MPI's own choice
  if (session_.empty())
    throw ConfigError("cannot make a folder in " + temporary_folder() + ": " + std::strerror(errno) +
                      ". Mend: set TMPDIR to one that can be written");
  if (records_.empty()) {
    records_ = session_ + "/records";
    ::mkdir(records_.c_str(), 0700);
  }
}

LaunchFolder::~LaunchFolder() {
  std::error_code ignored;
  if (!records_.starts_with(session_ + "/")) remove_records(records_);
  if (!run_dir_.empty()) {
    ::rmdir((run_dir_ + "/launch").c_str());
    if (made_run_dir_) ::rmdir(run_dir_.c_str());
  }
  files::remove_all(session_, ignored);
  if (!shared_memory_.empty()) files::remove_all(shared_memory_, ignored);
}

std::vector<std::string> sweep_dead_launches(const std::string& run_dir) {
  constexpr std::chrono::seconds kEnds{5};
  const std::string records = run_dir.empty() ? "" : files::absolute(run_dir).string() + "/launch";
  std::vector<std::string> told;
  for (const std::string& parent : {records, temporary_folder(), std::string(kSharedMemory)}) {
    std::error_code error;
    if (parent.empty()) continue;
    std::vector<std::string> dead;
    for (files::directory_iterator entry(parent, error), end; !error && entry != end; entry.increment(error)) {
      const std::string name = entry->path().filename();
      if (is_dead_launcher(name) && is_our_directory(entry->path())) dead.push_back(entry->path());
    }
    for (const std::string& folder : dead) {
      const bool holds_records = parent == records;
      for (const std::string& launch : {folder, folder + "/records"}) {
        for (const pid_t pid : end_processes_of(launch, kEnds))
          told.push_back("process " + std::to_string(pid) + " of an earlier start cannot be ended");
      }
      if (holds_records) {
        remove_records(folder);
      } else {
        files::remove_all(folder, error);
      }
      told.push_back("removed " + folder + " of a launcher that was killed");
    }
  }
  return told;
}

std::vector<pid_t> end_processes_of(const std::string& records, std::chrono::milliseconds limit) {
  const std::string word = "LOCKSTEP_LAUNCH_DIR=" + records;
  const Clock::time_point give_up = Clock::now() + limit;
  std::vector<pid_t> left = processes_with(word);
  while (!left.empty() && Clock::now() < give_up) {
    for (const pid_t pid : left) ::kill(pid, SIGKILL);
    ::poll(nullptr, 0, 5);
    left = processes_with(word);
  }
  return left;
}

}  // namespace lockstep::launcher
