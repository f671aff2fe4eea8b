#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

#include <dlfcn.h>
#include <sys/resource.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

#include "finding.h"
#include "hosts.h"
#include "machine.h"
#include "machine_checks.h"
#include "open_mpi.h"
#include "verbs.h"

namespace lockstep::launcher {
namespace {

const std::vector<Arguments::Flag> kFlags = {
    {"run_dir", "FOLDER", "the storage to measure (default: the current folder)"},
    {"program", "PATH", "the program whose libraries to look for (default: those beside lockstep)"},
    {"hosts", "A,B",
     "look at each of these hosts, through ssh or Open MPI's plm_rsh_agent, and at what is between them"},
    {"hostfile", "FILE", "the same for the hosts of a hostfile"},
    {"short", nullptr,
     "only what takes milliseconds, as `lockstep run` does on every host before its first start; whether a run_dir "
     "that is not there yet can be made"},
    {"json", nullptr, "one JSON list instead of lines"},
};

constexpr ExitCode kNode = ExitCode::kNodeBad;  // this machine lacks something: another one may do

Finding check_version() { return {"lockstep", true, LOCKSTEP_VERSION, ""}; }

Finding check_mpi(const std::string& mpirun) {
  const std::string version = first_line(ask({mpirun, "--version"}).output);
  const bool good = version.find("Open MPI") != std::string::npos &&
                    (version.find(" 4.") != std::string::npos || version.find(" 5.") != std::string::npos);
  return {"Open MPI", good, mpirun.empty() ? "no mpirun on PATH" : version,
          "apt-get install openmpi-bin libopenmpi-dev (Open MPI 4.1 or 5.0)"};
}

// After the map of ranks.
std::string first_complaint(const std::string& said) {
  const bool has_map = said.starts_with("lockstep: ranks ") && said.find('\n') != std::string::npos;
  return first_line(has_map ? said.substr(said.find('\n') + 1) : said);
}

// Through the launcher itself: what it sets is what a run gets.
Finding check_mpi_starts() {
  const auto start = std::chrono::steady_clock::now();
  const Answer answer = ask({"/proc/self/exe", "run", "-n", "2", "--", "true"});
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start);
  return {"2 ranks start", answer.exit_code == 0,
          answer.exit_code == 0 ? "and end in " + std::to_string(ms.count()) + " ms" : first_complaint(answer.output),
          "run `lockstep run -n 2 -- true` and read its message"};
}

// The dynamic linker's own word on the libraries of a program; nothing of the program runs.
Finding check_libraries(const std::string& program) {
  const Answer answer = ask({"ldd", program});
  std::string missing, torch;
  std::istringstream lines(answer.output);
  for (std::string line; std::getline(lines, line);) {  // "\tlibx.so.1 => /folder/libx.so.1 (0x7f…)"
    std::istringstream words(line);
    std::string library, arrow, path;
    words >> library >> arrow >> path;
    if (path == "not") missing += " " + library;
    if (library == "libtorch_cpu.so" && path != "not") torch = std::filesystem::path(path).parent_path();
  }
  const std::string found = answer.exit_code != 0 ? first_line(answer.output)
                            : !missing.empty()    ? "not found:" + missing
                            : torch.empty()       ? "all there (needs no LibTorch)"
                                                  : "all there, LibTorch at " + torch;
  return {"libraries of " + std::filesystem::path(program).filename().string(),
          missing.empty() && answer.exit_code == 0, found,
          "run cmake/setup.sh and build again, or add their folder to LD_LIBRARY_PATH"};
}

std::vector<Finding> check_programs(const std::string& wanted) {
  if (!wanted.empty()) {
    const std::string path = find_program(wanted);
    if (path.empty())
      return {{"program " + wanted, false, "not there or cannot be executed", "check the path, or build it"}};
    return {check_libraries(path)};
  }
  std::vector<Finding> findings;
  std::error_code ignored;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", ignored);
  for (const char* name : {"gpt", "image_classification"}) {  // the programs with LibTorch that we install
    const std::string path = self.parent_path() / name;
    if (!find_program(path).empty()) findings.push_back(check_libraries(path));
  }
  return findings;
}

// Loaded, never linked: most machines that build this have no driver.
Finding check_gpu() {
  const bool has_device = std::filesystem::exists("/dev/nvidiactl");
  void* driver = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!driver)
    return {"GPU", !has_device,
            has_device ? "/dev/nvidiactl is there, libcuda.so.1 is not" : "none: ranks train on the CPU",
            "install the driver's user libraries (containers: start with --gpus all)"};
  using Init = int (*)(unsigned);
  using Get = int (*)(int*);
  const auto init = reinterpret_cast<Init>(::dlsym(driver, "cuInit"));
  const auto version = reinterpret_cast<Get>(::dlsym(driver, "cuDriverGetVersion"));
  const auto count = reinterpret_cast<Get>(::dlsym(driver, "cuDeviceGetCount"));
  int code = -1, cuda = 0, devices = 0;
  if (init && version && count && (code = init(0)) == 0) {
    version(&cuda);
    count(&devices);
  }
  // Not unloaded: the driver's threads may still be in it.
  constexpr int kNoDevice = 100;  // CUDA_ERROR_NO_DEVICE
  if (code == kNoDevice && !has_device) return {"GPU", true, "none: ranks train on the CPU", ""};
  return {"GPU", code == 0 && devices > 0,
          code == 0 ? std::to_string(devices) + ", driver for CUDA " + std::to_string(cuda / 1000) + "." +
                          std::to_string(cuda % 1000 / 10)
                    : "the driver answers with error " + std::to_string(code),
          "look at nvidia-smi; restart the node or its driver", kNode};
}

// As training programs find it: the dynamic linker does, for the plug-in that lies beside lockstep's libraries.
Finding check_nccl() {
  const bool has_device = std::filesystem::exists("/dev/nvidiactl");
  const std::string mend =
      "build with -DLOCKSTEP_CUDA=ON where NCCL's headers are (package libnccl-dev), or add the "
      "folder of libnccl.so.2 to LD_LIBRARY_PATH";
  Dl_info info{};
  ::dladdr(reinterpret_cast<const void*>(&real_fs), &info);
  const auto plugin = std::filesystem::path(info.dli_fname ? info.dli_fname : "").parent_path() / "liblockstep_cuda.so";
  if (!std::filesystem::exists(plugin)) return {"NCCL", !has_device, "left out: no CUDA plug-in was built", mend};
  std::istringstream lines(ask({"ldd", plugin}).output);
  std::string path;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string library, arrow;
    if (words >> library >> arrow && library == "libnccl.so.2") words >> path;
  }
  void* nccl = path.starts_with("/") ? ::dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL) : nullptr;
  const auto get = nccl ? reinterpret_cast<int (*)(int*)>(::dlsym(nccl, "ncclGetVersion")) : nullptr;
  int version = 0;
  if (!get || get(&version) != 0) return {"NCCL", !has_device, "the CUDA plug-in does not find libnccl.so.2", mend};
  return {
      "NCCL", true,
      std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100),
      ""};
}

Finding check_cores() {
  const double quota = cgroup_core_quota();
  const int cores = usable_cores();
  std::string found = std::to_string(cores) + " usable of " + std::to_string(::sysconf(_SC_NPROCESSORS_ONLN));
  if (quota > 0) found += ", cgroup quota " + std::to_string(quota).substr(0, 5);
  return {"cores", quota == 0 || quota >= 1, found, "raise the container's CPU limit to 1 at least", kNode};
}

// Bits of a run are the same only where math libraries choose the same instructions.
Finding check_instructions() {
  const char* name = __builtin_cpu_supports("avx512f") ? "AVX-512"
                     : __builtin_cpu_supports("avx2")  ? "AVX2"
                                                       : "no AVX2";
  return {"instructions", true, name, ""};
}

// Only RDMA and pinned host memory need much; on a machine without them any value will do.
Finding check_locked_memory() {
  rlimit limit{};
  ::getrlimit(RLIMIT_MEMLOCK, &limit);
  const bool matters = std::filesystem::exists("/dev/infiniband") || std::filesystem::exists("/dev/nvidiactl");
  const bool unlimited = limit.rlim_cur == RLIM_INFINITY;
  return {"locked memory", unlimited || !matters || limit.rlim_cur >= (1ULL << 30),
          unlimited ? "unlimited" : "limit " + std::to_string(limit.rlim_cur >> 20) + " MiB",
          "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK)"};
}

std::vector<Finding> examine_machine(const Arguments& arguments) {
  std::vector<Finding> findings = {check_version(), check_mpi(find_program("mpirun"))};
  if (findings.back().good) findings.push_back(check_mpi_starts());
  for (Finding& finding : check_programs(arguments.get("program", ""))) findings.push_back(std::move(finding));
  for (Finding& finding : std::vector<Finding>{
           check_gpu(), check_nccl(), check_cores(), check_instructions(), check_memory(), check_shared_memory(),
           check_open_files(), check_locked_memory(), check_clock(), check_storage(arguments.get("run_dir", "."))}) {
    findings.push_back(std::move(finding));
  }
  return findings;
}

std::vector<Host> named_hosts(const Arguments& arguments) {
  if (arguments.has("hosts") && arguments.has("hostfile"))
    throw ConfigError("--hosts and --hostfile are both given. Mend: one of them");
  if (!arguments.has("hostfile")) return parse_host_list(arguments.get("hosts", ""));
  std::ifstream file(arguments.get("hostfile", ""));
  if (!file) throw ConfigError("cannot read " + arguments.get("hostfile", "") + ". Mend: check the path of --hostfile");
  std::ostringstream text;
  text << file.rdbuf();
  return parse_hostfile(text.str(), 1);
}

std::vector<Finding> examine(const Arguments& arguments) {
  if (arguments.has("short")) {
    if (arguments.has("hosts") || arguments.has("hostfile") || arguments.has("program"))
      throw ConfigError("--short looks at this machine alone. Mend: leave out --hosts, --hostfile and --program");
    const std::string run_dir = arguments.get("run_dir", ".");
    return short_look(run_dir.empty() ? "" : without_slash(std::filesystem::absolute(run_dir).lexically_normal()));
  }
  if (!arguments.has("hosts") && !arguments.has("hostfile")) return examine_machine(arguments);
  const std::string run_dir = std::filesystem::absolute(arguments.get("run_dir", "."));
  std::vector<std::string> flags = {"--run_dir=" + run_dir};
  if (arguments.has("program")) flags.push_back("--program=" + arguments.get("program", ""));
  const Environment environment = process_environment();
  return examine_hosts(named_hosts(arguments), remote_agent(environment, environment("SLURM_JOB_ID").has_value()),
                       run_dir, flags);
}

int doctor(const Arguments& arguments) {
  if (!arguments.words().empty() || arguments.has_rest())
    throw ConfigError("leftover words. Mend: lockstep " + std::string(kDoctor.usage));
  ExitCode worst = ExitCode::kDone;
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Finding& finding : examine(arguments)) {
    if (!finding.good && worst != ExitCode::kConfig) worst = finding.code;  // what a person can mend here comes first
    json.push_back(to_json(finding));
    if (arguments.has("json")) continue;
    std::cout << finding;
  }
  if (arguments.has("json")) std::cout << json.dump(2) << "\n";
  return static_cast<int>(worst);
}

}  // namespace

const Verb kDoctor = {
    "doctor", "doctor [--hosts A,B | --hostfile FILE] [--run_dir FOLDER] [--program PATH] [--short] [--json]",
    "Looks at what this machine, or each host, lacks for training; each bad line says how to mend it. Exit "
    "code 0: nothing; 78: set-up; 79: the machine.",
    &kFlags, &doctor};

}  // namespace lockstep::launcher
