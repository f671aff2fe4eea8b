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

/// What CPU memory is for.
enum class MemoryKind : uint8_t {
  kOther,       ///< whatever no scope names: activations
  kParameters,  ///< what this rank owns of them
  kGradients,
  kOptimizer,
  kGathered,  ///< parameters gathered for a while
  kBuckets,   ///< gradients on their way
  kScratch,
};
inline constexpr int kMemoryKinds = 7;

/// What this thread takes in the scope is of this kind, until it is freed, whoever frees it. A storage that is resized
/// inside counts anew, whole, as of this kind.
class MemoryScope {
 public:
  explicit MemoryScope(MemoryKind kind);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;

 private:
  MemoryKind was_;
};

struct KindMemory {
  int64_t current_bytes = 0;  ///< as asked for: exact sizes, where cpu_memory() counts whole blocks
  int64_t peak_bytes = 0;
};
KindMemory cpu_memory(MemoryKind kind);

/// Peaks, of all and of each kind, start again from what is in use now.
void reset_peaks();

}  // namespace lockstep::nn
