#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <new>
#include <thread>

#include <ATen/native/Resize.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/nn/functions.h>

namespace lockstep::nn {
namespace {

constexpr int64_t kMiB = 1 << 20;

at::Tensor bytes(int64_t n) { return at::empty({n}, at::kByte); }

class CpuAllocatorTest : public testing::Test {
 protected:
  void SetUp() override { install_cpu_allocator(); }
};

TEST_F(CpuAllocatorTest, EverySizeIsAlignedWholeAndApartFromTheOthers) {
  std::vector<at::Tensor> live;
  for (const int64_t n : {0L, 1L, 3L, 63L, 64L, 65L, 79L, 80L, 81L, 127L, 128L, 129L, 1'000'003L, 2 * kMiB - 64,
                          2 * kMiB - 63, 2 * kMiB, 2 * kMiB + 1, 5 * kMiB - 1, 5 * kMiB + 1}) {
    for (int copy = 0; copy < 2; ++copy) {
      live.push_back(bytes(n));
      EXPECT_EQ(reinterpret_cast<uintptr_t>(live.back().data_ptr()) % 64, 0u) << n;
      live.back().fill_(static_cast<int>(live.size()));
    }
  }
  for (size_t i = 0; i < live.size(); ++i)
    EXPECT_TRUE(live[i].eq(static_cast<int>(i) + 1).all().item<bool>()) << live[i].numel();
}

TEST_F(CpuAllocatorTest, AFreedBlockServesTheNextOfItsSize) {
  for (const int64_t n : {1L, 100L, 1'000'003L, 3 * kMiB}) {
    at::Tensor first = bytes(n);
    const void* const place = first.data_ptr();
    const auto held = cpu_memory();
    first.reset();
    const auto freed = cpu_memory();
    const int64_t block = held.current_bytes - freed.current_bytes;
    EXPECT_GE(block, n);
    EXPECT_LE(block, std::max<int64_t>(64, n + n / 4)) << "a size class wastes at most a fifth of a block";
    EXPECT_EQ(freed.cached_bytes, held.cached_bytes + block);
    const at::Tensor second = bytes(n);
    EXPECT_EQ(second.data_ptr(), place);
    EXPECT_EQ(cpu_memory().cached_bytes, held.cached_bytes);
    EXPECT_EQ(cpu_memory().current_bytes, held.current_bytes);
  }
}

TEST_F(CpuAllocatorTest, InstallingAgainKeepsTheCache) {
  const void* place = nullptr;
  {
    const at::Tensor x = bytes(777'777);
    place = x.data_ptr();
    install_cpu_allocator();
  }
  install_cpu_allocator();
  EXPECT_EQ(bytes(777'777).data_ptr(), place);
}

TEST_F(CpuAllocatorTest, PeakIsTheMostThatWasEverInUse) {
  const int64_t room = cpu_memory().peak_bytes - cpu_memory().current_bytes;
  const at::Tensor filled = bytes(room + 1);  // so that whatever comes now is a new peak
  const int64_t before = cpu_memory().peak_bytes;
  bytes(10 * kMiB);
  EXPECT_GE(cpu_memory().peak_bytes, before + 10 * kMiB);
  EXPECT_LE(cpu_memory().peak_bytes, before + 13 * kMiB);
  EXPECT_LE(cpu_memory().current_bytes, before);
}

TEST_F(CpuAllocatorTest, AnotherThreadMayFree) {
  const auto before = cpu_memory();
  at::Tensor x = bytes(654'321);
  const void* const place = x.data_ptr();
  std::thread([taken = std::move(x)]() mutable { taken.reset(); }).join();
  EXPECT_EQ(cpu_memory().current_bytes, before.current_bytes);
  EXPECT_EQ(bytes(654'321).data_ptr(), place);
}

constexpr std::array kKinds = {MemoryKind::kOther,     MemoryKind::kParameters, MemoryKind::kGradients,
                               MemoryKind::kOptimizer, MemoryKind::kGathered,   MemoryKind::kBuckets,
                               MemoryKind::kScratch};
static_assert(kKinds.size() == kMemoryKinds);

int64_t current(MemoryKind kind) { return cpu_memory(kind).current_bytes; }

std::vector<int64_t> current_of_all() {
  std::vector<int64_t> bytes(kKinds.size());
  std::transform(kKinds.begin(), kKinds.end(), bytes.begin(), current);
  return bytes;
}

TEST_F(CpuAllocatorTest, EveryKindCountsTheBytesAskedForAndNoOther) {
  for (const MemoryKind kind : kKinds) {
    const std::vector<int64_t> before = current_of_all();
    {
      const MemoryScope scope(kind);
      const std::vector<at::Tensor> live = {bytes(0), bytes(1), bytes(65), bytes(1'000'003), bytes(3 * kMiB + 1)};
      for (size_t i = 0; i < kKinds.size(); ++i)
        EXPECT_EQ(current(kKinds[i]) - before[i], kKinds[i] == kind ? 1 + 65 + 1'000'003 + 3 * kMiB + 1 : 0);
    }
    for (size_t i = 0; i < kKinds.size(); ++i) EXPECT_EQ(current(kKinds[i]), before[i]);
  }
}

TEST_F(CpuAllocatorTest, ABlockKeepsItsKindUntilAnyoneFreesItAnywhere) {
  const int64_t gathered = current(MemoryKind::kGathered), buckets = current(MemoryKind::kBuckets);
  at::Tensor x;
  {
    const MemoryScope outer(MemoryKind::kGathered);
    { const MemoryScope inner(MemoryKind::kBuckets); }
    x = bytes(12'345);
  }
  EXPECT_EQ(current(MemoryKind::kGathered), gathered + 12'345);
  const at::Tensor other = bytes(12'345);
  EXPECT_EQ(current(MemoryKind::kGathered), gathered + 12'345) << "the scope is over";
  std::thread([taken = std::move(x)]() mutable {
    const MemoryScope scope(MemoryKind::kBuckets);
    taken.reset();
  }).join();
  EXPECT_EQ(current(MemoryKind::kGathered), gathered);
  EXPECT_EQ(current(MemoryKind::kBuckets), buckets);
}

TEST_F(CpuAllocatorTest, AResizedStorageCountsWhereItWasResized) {
  const int64_t gathered = current(MemoryKind::kGathered), parameters = current(MemoryKind::kParameters);
  const MemoryScope outer(MemoryKind::kParameters);
  const at::Tensor x = bytes(1'000);
  c10::StorageImpl* const storage = x.storage().unsafeGetStorageImpl();
  EXPECT_EQ(current(MemoryKind::kParameters), parameters + 1'000);
  for (const int64_t size : {777, 0, 5'000, 5'001, 0}) {
    const MemoryScope scope(MemoryKind::kGathered);
    at::native::resize_bytes_cpu(storage, static_cast<size_t>(size));
    EXPECT_EQ(current(MemoryKind::kGathered), gathered + size);
    EXPECT_EQ(current(MemoryKind::kParameters), parameters);
  }
}

TEST_F(CpuAllocatorTest, PeaksOfKindsStartAgainFromWhatIsInUse) {
  const MemoryScope scope(MemoryKind::kScratch);
  const at::Tensor held = bytes(1'001);
  bytes(5 * kMiB);
  EXPECT_GE(cpu_memory(MemoryKind::kScratch).peak_bytes, 5 * kMiB + 1'001);
  reset_peaks();
  EXPECT_EQ(cpu_memory(MemoryKind::kScratch).peak_bytes, current(MemoryKind::kScratch));
  EXPECT_EQ(cpu_memory().peak_bytes, cpu_memory().current_bytes);
  const int64_t before = current(MemoryKind::kScratch);
  bytes(777);
  EXPECT_EQ(cpu_memory(MemoryKind::kScratch).peak_bytes, before + 777);
}

TEST_F(CpuAllocatorTest, KindsAreExactWhenThreadsTakeAndFreeAtOnce) {
  const std::vector<int64_t> before = current_of_all();
  std::vector<std::thread> threads;
  std::vector<at::Tensor> left(kKinds.size());
  for (size_t i = 0; i < kKinds.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int64_t n = 1; n < 2000; ++n) {
        const MemoryScope scope(kKinds[(i + static_cast<size_t>(n)) % kKinds.size()]);
        bytes(n);
      }
      const MemoryScope scope(kKinds[i]);
      left[i] = bytes(100 + static_cast<int64_t>(i));
    });
  }
  for (auto& thread : threads) thread.join();
  for (size_t i = 0; i < kKinds.size(); ++i) EXPECT_EQ(current(kKinds[i]), before[i] + 100 + static_cast<int64_t>(i));
}

// Time of small blocks, best of many: --gtest_also_run_disabled_tests --gtest_filter=*Cost*
TEST_F(CpuAllocatorTest, DISABLED_CostOfASmallBlock) {
  c10::Allocator* const allocator = c10::GetCPUAllocator();
  double best = 1e9;
  for (int round = 0; round < 50; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 100'000; ++i) allocator->allocate(256);
    best = std::min(best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("%.1f ns to take and free 256 bytes\n", best / 100'000);
}

TEST_F(CpuAllocatorTest, ThreadsThatTakeAndFreeNeverShareABlock) {
  const int64_t before = cpu_memory().current_bytes;
  std::atomic<int> clashes = 0;
  std::array<std::thread, 4> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads[thread] = std::thread([&, thread] {
      std::vector<at::Tensor> live(8);
      for (int i = 0; i < 3000; ++i) {
        at::Tensor& slot = live[static_cast<size_t>(i * 5 % 8)];
        if (slot.defined()) {
          const auto* data = slot.const_data_ptr<uint8_t>();
          clashes += data[0] != thread || data[slot.numel() - 1] != thread;
        }
        slot = bytes(1 + i * 37 % 300);
        auto* data = slot.mutable_data_ptr<uint8_t>();
        data[0] = data[slot.numel() - 1] = static_cast<uint8_t>(thread);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(clashes, 0);
  EXPECT_EQ(cpu_memory().current_bytes, before);
}

TEST_F(CpuAllocatorTest, MoreThanThereIsIsAnExceptionAndLeavesNoTrace) {
  const auto before = cpu_memory();
  for (const int power : {46, 49, 60, 62}) EXPECT_ANY_THROW(bytes(int64_t{1} << power)) << power;
  EXPECT_EQ(cpu_memory().current_bytes, before.current_bytes);
  EXPECT_EQ(cpu_memory().peak_bytes, before.peak_bytes);
}

TEST_F(CpuAllocatorTest, ALossOverManyClassesNeverHoldsAllLogits) {
  constexpr int64_t kRows = 2048, kVocab = 8209, kLogits = kRows * kVocab * 4;  // 64 MiB
  const at::Tensor x = at::full({kRows, 4}, 0.1F).requires_grad_(), w = at::full({kVocab, 4}, 0.1F).requires_grad_();
  const at::Tensor targets = at::zeros({kRows}, at::kLong);
  const at::Tensor filled = bytes(cpu_memory().peak_bytes - cpu_memory().current_bytes + 1);
  const int64_t before = cpu_memory().peak_bytes;
  linear_cross_entropy_sum(x, w, targets).backward();
  EXPECT_GT(cpu_memory().peak_bytes, before);
  EXPECT_LT(cpu_memory().peak_bytes, before + kLogits / 8);
}

}  // namespace
}  // namespace lockstep::nn
