#pragma once

#include <cstdint>

#include <lockstep/base/memory_count.h>

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

// Counted by kind too, with the mapped memory of collectives: base/memory_count.h. A storage that is resized counts
// anew, whole, as of the kind in force.
using lockstep::kMemoryKinds;
using lockstep::MemoryKind;
using lockstep::MemoryScope;

/// Of one kind; bytes as asked for: exact sizes, where cpu_memory() counts whole blocks.
MemoryInUse cpu_memory(MemoryKind kind);

/// Peaks, of all and of each kind, start again from what is in use now.
void reset_peaks();

}  // namespace lockstep::nn
