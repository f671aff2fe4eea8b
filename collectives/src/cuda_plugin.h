#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// What NCCL needs to know of the world, and the one thing it cannot do itself: bring rank 0's bytes to all ranks.
struct NcclWorld {
  int rank = 0;
  int world_size = 1;
  int device = 0;
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;  ///< for building the communicator, and for splits and close()
  std::function<void(std::span<std::byte> id)> share_id;
};

/// Everything the core asks of CUDA. It lives in liblockstep_cuda.so beside libcollectives, so that a CPU run neither
/// needs nor loads a CUDA library (DESIGN 3).
struct CudaPlugin {
  static constexpr int kVersion = 1;  ///< of this struct and of ProcessGroup: raised when either changes

  int (*device_count)();
  void (*set_device)(int device);  ///< for the calling thread
  std::unique_ptr<ProcessGroup> (*make_nccl_world)(const NcclWorld& world);
};

/// What loading gave: the plug-in, or why there is none.
struct CudaState {
  const CudaPlugin* plugin = nullptr;
  bool has_driver = false;
  std::string why;  ///< when there is no plugin: one sentence with its mend
};

/// Looks for a driver without asking torch, which would remember "no CUDA" for ever (facts 12), then loads the plug-in
/// from `folder`, or from libcollectives' own when it is empty. Call before the first use of torch.
CudaState load_cuda_plugin(const std::string& folder = "");

}  // namespace lockstep

/// The plug-in's one symbol. @return null when `version` is not the one it was built for.
extern "C" const lockstep::CudaPlugin* lockstep_cuda_plugin(int version);
