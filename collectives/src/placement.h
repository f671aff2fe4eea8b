#pragma once

#include <span>

#include <lockstep/base/rank_info.h>
#include <lockstep/collectives/runtime.h>

#include "cuda_plugin.h"

namespace lockstep {

/// Where a rank computes, and what its group runs on.
struct Placement {
  bool is_on_gpu = false;
  bool is_over_nccl = false;
};

/// Refuses options that are unknown or contradict each other. @return whether a GPU is worth looking for.
/// @throws ConfigError with the mend.
bool may_use_gpu(const RuntimeOptions& options);

/// @throws ConfigError when what was asked for is not there, or the launcher leaves no way to talk.
Placement choose_placement(const RuntimeOptions& options, const RankInfo& info, const CudaState& cuda);

/// What the ranks of a CPU run talk over.
enum class CpuBackend { kMpi, kShm, kTwoLevel };

/// @param nodes a number for each rank's node, as node_of_ranks(). auto: shm where all ranks share a node, both where
/// several nodes hold several ranks, else mpi.
/// @throws ConfigError when shm was asked for and ranks live on several nodes.
CpuBackend choose_cpu_backend(const RuntimeOptions& options, std::span<const int> nodes);

}  // namespace lockstep
