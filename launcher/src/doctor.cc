#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>

#include <dlfcn.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

#include "verbs.h"

namespace lockstep::launcher {
namespace {

const std::vector<Arguments::Flag> kFlags = {
    {"run_dir", "FOLDER", "the storage to measure (default: the current folder)"},
    {"json", nullptr, "one JSON object instead of lines"},
};

struct Finding {
  std::string what;
  bool good = true;
  std::string found;
  std::string mend;
};

std::string first_line_of(const char* command) {  // fixed commands of ours only: nothing a user says gets here
  std::string line;
  if (FILE* pipe = ::popen(command, "re")) {
    char text[256] = {};
    if (std::fgets(text, sizeof(text), pipe)) line = text;
    ::pclose(pipe);
  }
  while (!line.empty() && (line.back() == '\n' || line.back() == ' ')) line.pop_back();
  return line;
}

Finding check_mpi() {
  const std::string version = first_line_of("mpirun --version 2>/dev/null");
  const bool good = version.find("Open MPI") != std::string::npos || version.find("OpenRTE") != std::string::npos;
  return {"Open MPI", good, version.empty() ? "no mpirun on PATH" : version,
          "apt-get install openmpi-bin libopenmpi-dev"};
}

Finding check_mpi_starts() {
  const std::string answer = first_line_of(
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 "
      "OMPI_MCA_plm=isolated mpirun -n 2 true >/dev/null 2>&1 && echo ok");
  return {"mpirun starts 2 ranks", answer == "ok", answer == "ok" ? "yes" : "no",
          "run `mpirun -n 2 true` and read its message"};
}

Finding check_gpu() {
  void* driver = ::dlopen("libcuda.so.1", RTLD_LAZY);
  if (driver) ::dlclose(driver);
  return {"GPU driver", true, driver ? "found (libcuda.so.1)" : "none: ranks train on the CPU", ""};
}

Finding check_cores() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  sched_getaffinity(0, sizeof(mask), &mask);
  const int cores = CPU_COUNT(&mask);
  double quota = 0;
  if (std::ifstream file("/sys/fs/cgroup/cpu.max"); file) {
    std::string limit;
    double period = 0;
    if (file >> limit >> period && limit != "max" && period > 0) quota = std::stod(limit) / period;
  }
  const bool good = quota == 0 || quota >= cores - 0.01;
  return {"cores", good,
          std::to_string(cores) + (quota > 0 ? ", limited to " + std::to_string(quota) + " by the cgroup" : ""),
          "start no more ranks than the cgroup's limit, or raise it"};
}

Finding check_memory() {
  std::ifstream file("/proc/meminfo");
  long kib = 0;
  for (std::string key; file >> key;) {
    if (key == "MemAvailable:") file >> kib;
  }
  return {"memory", kib > (1 << 20), std::to_string(kib / 1024) + " MiB available",
          "free some: a rank needs about 120 MiB before its model"};
}

Finding check_shared_memory() {
  struct statvfs status {};
  const bool there = ::statvfs("/dev/shm", &status) == 0;
  const uint64_t mib = there ? status.f_bavail * status.f_frsize >> 20 : 0;
  return {"/dev/shm", mib >= 64, std::to_string(mib) + " MiB free",
          "mount -o remount,size=1G /dev/shm (containers: --shm-size=1g)"};
}

Finding check_files() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return {"open files", limit.rlim_cur >= 1024, std::to_string(limit.rlim_cur), "ulimit -n 4096"};
}

// 64 MiB written and synced: what a checkpoint will feel.
Finding check_storage(const std::string& folder) {
  constexpr uint64_t kBytes = 64 << 20;
  const std::string path = folder + "/.lockstep-doctor-" + std::to_string(::getpid());
  try {
    const std::vector<std::byte> data(kBytes, std::byte{1});
    const auto start = std::chrono::steady_clock::now();
    const auto file = real_fs().create_exclusive(path);
    file->write_at(0, data);
    file->sync();
    file->close();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    real_fs().remove_file(path);
    const auto rate = static_cast<int64_t>(kBytes / seconds / 1e6);
    return {"storage of " + folder, rate >= 20, std::to_string(rate) + " MB/s written and synced",
            "put --run_dir on faster storage"};
  } catch (const Error& error) {
    return {"storage of " + folder, false, error.what(), "name a folder you may write with --run_dir"};
  }
}

int doctor(const Arguments& arguments) {
  if (!arguments.words().empty() || arguments.has_rest())
    throw ConfigError("leftover words. Mend: lockstep " + std::string(kDoctor.usage));
  const std::vector<Finding> findings = {
      check_mpi(),    check_mpi_starts(),    check_gpu(),   check_cores(),
      check_memory(), check_shared_memory(), check_files(), check_storage(arguments.get("run_dir", "."))};
  bool all_good = true;
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Finding& finding : findings) {
    all_good &= finding.good;
    json.push_back({{"what", finding.what},
                    {"good", finding.good},
                    {"found", finding.found},
                    {"mend", finding.good ? "" : finding.mend}});
    if (arguments.has("json")) continue;
    std::cout << (finding.good ? "ok    " : "BAD   ") << finding.what << ": " << finding.found << "\n";
    if (!finding.good) std::cout << "      mend: " << finding.mend << "\n";
  }
  if (arguments.has("json")) std::cout << json.dump(2) << "\n";
  return all_good ? 0 : static_cast<int>(ExitCode::kConfig);
}

}  // namespace

const Verb kDoctor = {"doctor", "doctor [--run_dir FOLDER] [--json]",
                      "Looks at what this machine lacks for training; each bad line says how to mend it.", &kFlags,
                      &doctor};

}  // namespace lockstep::launcher
