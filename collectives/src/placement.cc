#include "placement.h"

#include <algorithm>
#include <set>

#include <lockstep/base/error.h>

namespace lockstep {

bool may_use_gpu(const RuntimeOptions& options) {
  if (options.device != "auto" && options.device != "cpu" && options.device != "cuda")
    throw ConfigError("--device=" + options.device + " is neither auto, cpu nor cuda");
  const bool is_for_cpu = options.backend == "mpi" || options.backend == "shm";
  if (options.backend != "auto" && !is_for_cpu && options.backend != "nccl")
    throw ConfigError("--backend=" + options.backend + " is neither auto, shm, mpi nor nccl");
  if (options.device == "cpu" && options.backend == "nccl")
    throw ConfigError("--backend=nccl moves GPU memory, but --device=cpu. Mend: drop one of the two");
  if (options.device == "cuda" && is_for_cpu) {
    throw ConfigError("--backend=" + options.backend +
                      " moves host memory, but --device=cuda. Mend: drop --backend, or use --device=cpu");
  }
  return options.device != "cpu" && !is_for_cpu;
}

Placement choose_placement(const RuntimeOptions& options, const RankInfo& info, const CudaState& cuda) {
  const bool is_gpu_wanted = options.device == "cuda" || options.backend == "nccl";
  if (is_gpu_wanted && cuda.plugin == nullptr) {
    throw ConfigError((options.device == "cuda" ? "--device=cuda" : "--backend=nccl") + std::string(" cannot be: ") +
                      cuda.why);
  }
  const bool is_on_gpu = may_use_gpu(options) && cuda.plugin != nullptr;
  if (!is_on_gpu && info.world_size > 1 && !info.has_mpi) {
    throw ConfigError("started by " + info.launcher + " with " + std::to_string(info.world_size) +
                      " ranks, but without MPI there is only NCCL, and this is a CPU run. Mend: lockstep run -n " +
                      std::to_string(info.world_size) + " -- PROGRAM FLAGS, or mpirun");
  }
  // Alone there is nobody to talk to: NCCL's start-up and its buffers are saved unless asked for.
  return {is_on_gpu, is_on_gpu && (info.world_size > 1 || options.backend == "nccl")};
}

CpuBackend choose_cpu_backend(const RuntimeOptions& options, std::span<const int> nodes) {
  if (options.backend == "mpi") return CpuBackend::kMpi;
  const auto num_nodes = std::set<int>(nodes.begin(), nodes.end()).size();
  if (options.backend == "shm" && num_nodes > 1) {
    throw ConfigError("--backend=shm, but the " + std::to_string(nodes.size()) + " ranks live on " +
                      std::to_string(num_nodes) +
                      " nodes (or in containers that do not see each other's processes). Mend: --backend=auto");
  }
  if (num_nodes == 1) return options.backend == "shm" || nodes.size() > 1 ? CpuBackend::kShm : CpuBackend::kMpi;
  return num_nodes < nodes.size() ? CpuBackend::kTwoLevel : CpuBackend::kMpi;
}

}  // namespace lockstep
