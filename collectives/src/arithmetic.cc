#include <cstdlib>
#include <fstream>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/headeronly/version.h>

#include <lockstep/collectives/arithmetic.h>

namespace lockstep {

void configure_arithmetic(int threads) {
  at::set_num_threads(threads);
  at::globalContext().setFlushDenormal(false);  // a library built with fast-math may have set it when it was loaded
  // Without it, the backward of x[index] adds in any order with two threads and more. Fresh memory needs no NaN fill.
  at::globalContext().setDeterministicFillUninitializedMemory(false);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
}

std::string arithmetic_record(int threads) {
  std::string record = "torch " TORCH_VERSION ", " + at::get_cpu_capability() + ", threads " + std::to_string(threads);
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.starts_with("model name")) {
      record += "," + line.substr(line.find(':') + 1);
      break;
    }
  }
  for (const char* name :
       {"ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}) {
    if (const char* value = std::getenv(name)) record += std::string(", ") + name + "=" + value;
  }
  return record;
}

}  // namespace lockstep
