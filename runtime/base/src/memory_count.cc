#include <array>
#include <atomic>
#include <cstddef>

#include <lockstep/base/memory_count.h>

namespace lockstep {
namespace {

thread_local MemoryKind t_kind = MemoryKind::kOther;

// Bytes in use and the most there ever were, by kind, and of all blocks. What every block of every lane changes shares
// one line, which a lane has to fetch once a block; peaks have another, that is hardly ever written.
constexpr size_t kBlocks = kMemoryKinds;
struct Gauges {
  alignas(64) std::array<std::atomic<int64_t>, kMemoryKinds + 1> current{};
  alignas(64) std::array<std::atomic<int64_t>, kMemoryKinds + 1> peak{};

  void add(size_t which, int64_t bytes) {
    const int64_t now = current[which].fetch_add(bytes, std::memory_order_relaxed) + bytes;
    int64_t before = peak[which].load(std::memory_order_relaxed);
    while (now > before && !peak[which].compare_exchange_weak(before, now, std::memory_order_relaxed)) {
    }
  }
  void subtract(size_t which, int64_t bytes) { current[which].fetch_sub(bytes, std::memory_order_relaxed); }
};
static_assert(sizeof(Gauges) == 128);

constinit Gauges g_gauges;

}  // namespace

MemoryScope::MemoryScope(MemoryKind kind) : was_(t_kind) { t_kind = kind; }
MemoryScope::~MemoryScope() { t_kind = was_; }

MemoryKind count_taken(int64_t bytes, int64_t block_bytes) {
  const MemoryKind kind = t_kind;
  g_gauges.add(static_cast<size_t>(kind), bytes);
  if (block_bytes > 0) g_gauges.add(kBlocks, block_bytes);
  return kind;
}

void count_given_back(MemoryKind kind, int64_t bytes, int64_t block_bytes) {
  g_gauges.subtract(static_cast<size_t>(kind), bytes);
  if (block_bytes > 0) g_gauges.subtract(kBlocks, block_bytes);
}

MemoryInUse memory_in_use(MemoryKind kind) {
  const auto which = static_cast<size_t>(kind);
  return {g_gauges.current[which], g_gauges.peak[which]};
}

MemoryInUse blocks_in_use() { return {g_gauges.current[kBlocks], g_gauges.peak[kBlocks]}; }

void reset_memory_peaks() {
  for (size_t which = 0; which <= kBlocks; ++which) g_gauges.peak[which] = g_gauges.current[which].load();
}

}  // namespace lockstep
