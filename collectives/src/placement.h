#pragma once

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

}  // namespace lockstep
