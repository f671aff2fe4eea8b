#pragma once

#include <cstdint>

namespace lockstep::nn {

/// Makes LibTorch take CPU memory from a cache of freed blocks: a training step frees and takes the same sizes again
/// and again, and malloc gives big ones back to the kernel each time. 64-byte aligned; big blocks ask for huge pages.
/// Idempotent, thread-safe.
void install_cpu_allocator();

struct CpuMemory {
  int64_t current_bytes = 0;  ///< in live tensors
  int64_t peak_bytes = 0;
  int64_t cached_bytes = 0;  ///< kept for reuse
};
CpuMemory cpu_memory();

}  // namespace lockstep::nn
