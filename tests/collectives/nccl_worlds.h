#pragma once

#include <c10/core/Device.h>

#include "cuda_plugin.h"
#include "worlds.h"

namespace lockstep {

/// The driver and the plug-in, loaded before torch is asked for CUDA.
const CudaState& cuda_state();

/// This rank's GPU; ranks beyond their number share them.
at::Device nccl_device();

}  // namespace lockstep
