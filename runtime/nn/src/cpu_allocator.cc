#include <array>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include <sys/mman.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/cpu_allocator.h>

namespace lockstep::nn {
namespace {

// Size classes: four to a power of two, from 64 bytes to 2^47. A block starts with a line that says what it is.
constexpr size_t kLine = 64;
constexpr size_t kHugeBytes = size_t{2} << 20;
constexpr int kClasses = 4 * 48;

int class_of(size_t bytes) {
  const size_t wanted = std::max(bytes, kLine);
  const int power = static_cast<int>(std::bit_width(wanted - 1)) -
                    1;  // 2^power < wanted <= 2^(power + 1), except that 64 has power 5
  const size_t quarter = size_t{1} << (power - 2);
  const size_t steps = (wanted - (size_t{1} << power) + quarter - 1) / quarter;  // 1..4
  return 4 * power + static_cast<int>(steps) - 1;
}

size_t bytes_of(int size_class) {
  const int power = size_class / 4;
  return (size_t{1} << power) + static_cast<size_t>(size_class % 4 + 1) * (size_t{1} << (power - 2));
}

size_t rounded_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Whole huge pages of address space, never given back. What is cut off at the ends costs addresses, not memory.
void* map_huge(size_t bytes) {
  const size_t size = rounded_up(bytes, kHugeBytes);
  void* mapped = mmap(nullptr, size + kHugeBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1,
                      /*offset=*/0);
  if (mapped == MAP_FAILED) return nullptr;
  void* block = static_cast<char*>(mapped) +
                (rounded_up(reinterpret_cast<size_t>(mapped), kHugeBytes) - reinterpret_cast<size_t>(mapped));
  madvise(block, size, MADV_HUGEPAGE);
  return block;
}

struct Header {
  int size_class;
  MemoryKind kind;
  int64_t bytes;  // asked for
};
static_assert(sizeof(Header) <= kLine);

struct alignas(64) FreeList {
  std::mutex mutex;
  std::vector<void*> blocks;
};

class CachingAllocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, at::kCPU};
    const int size_class = class_of(bytes);
    if (size_class >= kClasses) throw std::bad_alloc();
    void* block = take(size_class);
    const auto wanted = static_cast<int64_t>(bytes);
    const MemoryKind kind = count_taken(wanted, static_cast<int64_t>(bytes_of(size_class)));
    *static_cast<Header*>(block) = {size_class, kind, wanted};
    void* data = static_cast<char*>(block) + kLine;
    return {data, data, &release, at::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  static CpuMemory memory() {
    const auto [current, peak] = blocks_in_use();
    return {current, peak, owned_ - current};
  }

 private:
  static void* take(int size_class) {
    const auto bytes = static_cast<int64_t>(bytes_of(size_class));
    FreeList& list = lists()[size_class];
    void* block = nullptr;
    {
      const std::lock_guard lock(list.mutex);
      if (!list.blocks.empty()) {
        block = list.blocks.back();
        list.blocks.pop_back();
      }
    }
    if (!block) {
      const size_t size = static_cast<size_t>(bytes) + kLine;
      block = size >= kHugeBytes ? map_huge(size) : std::aligned_alloc(kLine, size);  // size is a multiple of kLine
      if (!block) throw std::bad_alloc();
      owned_ += bytes;
    }
    return block;
  }

  static void release(void* data) {
    if (!data) return;
    void* block = static_cast<char*>(data) - kLine;
    const Header header = *static_cast<Header*>(block);
    count_given_back(header.kind, header.bytes, static_cast<int64_t>(bytes_of(header.size_class)));
    FreeList& list = lists()[header.size_class];
    const std::lock_guard lock(list.mutex);
    list.blocks.push_back(block);
  }

  static std::array<FreeList, kClasses>& lists() {
    static auto* const lists = new std::array<FreeList, kClasses>;  // never destroyed: tensors in statics outlive us
    return *lists;
  }

  static inline std::atomic<int64_t> owned_{0};  // in use or kept: changes with new blocks only
};

}  // namespace

void install_cpu_allocator() {
  static CachingAllocator allocator;
  static std::once_flag once;
  std::call_once(once, [] { c10::SetCPUAllocator(&allocator, /*priority=*/1); });
}

CpuMemory cpu_memory() { return CachingAllocator::memory(); }
MemoryInUse cpu_memory(MemoryKind kind) { return memory_in_use(kind); }
void reset_peaks() { reset_memory_peaks(); }

}  // namespace lockstep::nn
