#include "machine_checks.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>

#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <lockstep/base/fs.h>

#include "batch_script.h"
#include "machine.h"

namespace lockstep::launcher {
namespace {

constexpr ExitCode kNode = ExitCode::kNodeBad;  // this machine lacks something: another one may do
// Of starts: a test of two ranks on a small machine needs no more.
constexpr uint64_t kLeastMemoryMib = 256, kLeastSharedMemoryMib = 16;

/// Seconds that writing a file of so many bytes takes. @throws IoError; the file is gone in any case.
double write_and_remove(const std::string& folder, uint64_t bytes, bool synced) {
  // Several hosts may do this at once, and their process numbers be alike.
  const std::string path = folder + "/.lockstep-doctor-" + own_name() + "-" + std::to_string(::getpid());
  const std::vector<std::byte> data(bytes, std::byte{1});
  const auto start = std::chrono::steady_clock::now();
  const auto file = real_fs().create_exclusive(path);
  try {
    file->write_at(0, data);
    if (synced) file->sync();
    file->close();
  } catch (...) {
    real_fs().remove_file(path);
    throw;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  real_fs().remove_file(path);
  return seconds;
}

bool is_for_good(int error_number) {
  constexpr std::array kForGood = {EACCES, EPERM, EROFS, ENOTDIR, ELOOP, ENAMETOOLONG};
  return std::find(kForGood.begin(), kForGood.end(), error_number) != kForGood.end();
}

}  // namespace

std::optional<uint64_t> memory_free_of_cgroup(const std::string& folder) {
  uint64_t limit = 0, used = 0, cached = 0;
  if (!(std::ifstream(folder + "/memory.max") >> limit) || !(std::ifstream(folder + "/memory.current") >> used))
    return std::nullopt;  // "max": no limit
  std::ifstream stat(folder + "/memory.stat");
  for (auto [key, bytes] = std::pair(std::string(), uint64_t{0}); stat >> key >> bytes;) {
    if (key == "inactive_file" || key == "active_file") cached += bytes;
  }
  used -= std::min(used, cached);
  return limit - std::min(limit, used);
}

Finding check_memory(uint64_t least_mib) {
  std::ifstream file("/proc/meminfo");
  uint64_t kib = 0;
  for (std::string key; file >> key;) {
    if (key == "MemAvailable:") file >> kib;
  }
  uint64_t mib = kib >> 10;
  if (const auto free = memory_free_of_cgroup("/sys/fs/cgroup")) mib = std::min(mib, *free >> 20);
  return {"memory", mib >= least_mib, std::to_string(mib) + " MiB available",
          "free some: a rank needs about 120 MiB before its model", kNode};
}

Finding check_shared_memory(uint64_t least_mib) {
  struct statvfs status {};
  const bool there = ::statvfs("/dev/shm", &status) == 0;
  const uint64_t mib = there ? (status.f_bavail * status.f_frsize) >> 20 : 0;
  return {"/dev/shm", mib >= least_mib, std::to_string(mib) + " MiB free",
          "mount -o remount,size=1G /dev/shm (containers: --shm-size=1g)", kNode};
}

Finding check_open_files() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return {"open files", limit.rlim_cur >= 1024, "limit " + std::to_string(limit.rlim_cur), "ulimit -n 4096"};
}

Finding check_clock() {
  using Clock = std::chrono::steady_clock;
  auto last = Clock::now();
  bool forward = true;
  for (int i = 0; i < 10000; ++i) {
    const auto now = Clock::now();
    forward &= now >= last;
    last = now;
  }
  const auto year = std::chrono::floor<std::chrono::days>(std::chrono::system_clock::now()) >
                    std::chrono::sys_days{std::chrono::year{2024} / 1 / 1};
  return {"clock", forward && year,
          !forward ? "runs backwards"
          : year   ? "monotonic, dated"
                   : "says a date before 2024",
          "start chronyd or another time service", kNode};
}

Finding check_storage(const std::string& folder) {
  constexpr uint64_t kBytes = 64 << 20;
  const std::string what = "storage of " + folder;
  try {
    const double seconds = write_and_remove(folder, kBytes, /*synced=*/true);
    const auto rate = static_cast<int64_t>(static_cast<double>(kBytes) / seconds / 1e6);
    return {what, rate >= 20, std::to_string(rate) + " MB/s written and synced", "put --run_dir on faster storage",
            kNode};
  } catch (const Error& error) {
    return {what, false, error.what(), "name a folder you may write with --run_dir"};
  }
}

Finding check_writable(const std::string& folder) {
  Finding finding{"storage of " + folder, true, "can be written", "name a folder you may write with --run_dir"};
  std::error_code ignored;
  std::filesystem::path there = folder;
  while (there.has_relative_path() && !std::filesystem::exists(there, ignored)) there = there.parent_path();
  try {
    write_and_remove(there, 4096, /*synced=*/false);
  } catch (const IoError& error) {
    finding.good = false;
    finding.found = error.what();
    finding.ends_run = is_for_good(error.error_number());
  }
  return finding;
}

std::vector<Finding> short_look(const std::string& run_dir) {
  std::vector<Finding> findings = {check_memory(kLeastMemoryMib), check_shared_memory(kLeastSharedMemoryMib),
                                   check_open_files(), check_clock()};
  if (!run_dir.empty()) findings.push_back(check_writable(run_dir));
  return findings;
}

std::vector<std::string> short_look_command(const std::vector<std::string>& agent, const std::string& run_dir) {
  const std::string self = std::filesystem::read_symlink("/proc/self/exe");
  // A host without lockstep at this place, or with an older one, answers all the same.
  const std::string script = quoted_for_bash(self) + " doctor --short --json " +
                             quoted_for_bash("--run_dir=" + run_dir) + " 2>/dev/null; true";
  return {"sh", "-c", has_shell(agent) ? quoted_for_bash(script) : script};
}

}  // namespace lockstep::launcher
