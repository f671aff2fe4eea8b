#include "placement.h"

#include <lockstep/base/error.h>

namespace lockstep {

bool may_use_gpu(const RuntimeOptions& options) {
  if (options.device != "auto" && options.device != "cpu" && options.device != "cuda")
    throw ConfigError("--device=" + options.device + " is neither auto, cpu nor cuda");
  if (options.backend != "auto" && options.backend != "mpi" && options.backend != "nccl")
    throw ConfigError("--backend=" + options.backend + " is neither auto, mpi nor nccl");
  if (options.device == "cpu" && options.backend == "nccl")
    throw ConfigError("--backend=nccl moves GPU memory, but --device=cpu. Mend: drop one of the two");
  if (options.device == "cuda" && options.backend == "mpi")
    throw ConfigError("--backend=mpi moves host memory, but --device=cuda. Mend: drop --backend, or use --device=cpu");
  return options.device != "cpu" && options.backend != "mpi";
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

}  // namespace lockstep
