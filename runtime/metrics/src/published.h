#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <thread>
#include <type_traits>

namespace lockstep::metrics {

/// A value that one thread replaces and others copy whole: a sequence lock. The writer never waits; a reader that was
/// overtaken tries again.
///
/// Without fences, which ThreadSanitizer does not know: a reader that acquires a word of the new value also sees the
/// odd number stored before it. On x86 all these orders are plain moves. Source: Boehm, "Can seqlocks get along with
/// programming language memory models?", MSPC 2012.
template <typename Value>
class Published {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) % sizeof(uint64_t) == 0);
  using Words = std::array<uint64_t, sizeof(Value) / sizeof(uint64_t)>;

 public:
  void store(const Value& value) {
    const auto words = std::bit_cast<Words>(value);
    const uint64_t number = number_.load(std::memory_order_relaxed);
    number_.store(number + 1, std::memory_order_relaxed);  // odd: being written
    for (size_t i = 0; i < words.size(); ++i) words_[i].store(words[i], std::memory_order_release);
    number_.store(number + 2, std::memory_order_release);
  }

  Value load() const {
    for (;; std::this_thread::yield()) {
      const uint64_t number = number_.load(std::memory_order_acquire);
      Words words;
      for (size_t i = 0; i < words.size(); ++i) words[i] = words_[i].load(std::memory_order_acquire);
      if (number % 2 != 0 || number_.load(std::memory_order_relaxed) != number) continue;
      return std::bit_cast<Value>(words);
    }
  }

 private:
  std::atomic<uint64_t> number_{0};
  std::array<std::atomic<uint64_t>, std::tuple_size_v<Words>> words_{};
};

}  // namespace lockstep::metrics
