#pragma once

#include <cstdint>

namespace lockstep {

/// What memory is for.
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

/// What this thread takes in the scope is of this kind, until it is freed, whoever frees it.
class MemoryScope {
 public:
  explicit MemoryScope(MemoryKind kind);
  ~MemoryScope();
  MemoryScope(const MemoryScope&) = delete;
  MemoryScope& operator=(const MemoryScope&) = delete;

 private:
  MemoryKind was_;
};

struct MemoryInUse {
  int64_t current_bytes = 0;
  int64_t peak_bytes = 0;
};

/// For whoever hands out memory of tensors: the CPU allocator, groups with mapped memory.
/// @param block_bytes of the allocator's, what the memory takes in whole blocks.
/// @return the kind in force, under which it is to be given back. Threads: any.
MemoryKind count_taken(int64_t bytes, int64_t block_bytes = 0);
void count_given_back(MemoryKind kind, int64_t bytes, int64_t block_bytes = 0);

MemoryInUse memory_in_use(MemoryKind kind);
MemoryInUse blocks_in_use();
/// Peaks, of blocks and of each kind, start again from what is in use now.
void reset_memory_peaks();

}  // namespace lockstep
