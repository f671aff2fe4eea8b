#pragma once

#include <cstddef>
#include <span>

namespace lockstep::checkpoint {

/// Memory that snapshots are copied into, kept from one to the next. It is the system's and not torch's, so that no
/// cache is emptied for it, and its pages are there before they are written: a copy costs a copy.
class Staging {
 public:
  Staging() = default;
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// At least `bytes` bytes, 64-byte aligned; what was there is lost where it has to grow. @throws ConfigError when the
  /// system has no such memory.
  std::span<std::byte> reserve(size_t bytes);

 private:
  void free() noexcept;
  std::span<std::byte> memory_;
};

}  // namespace lockstep::checkpoint
