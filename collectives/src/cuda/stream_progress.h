#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include <cuda_runtime_api.h>

namespace lockstep {

/// How far a stream has come, written by the device into host memory. Looking there calls nothing of CUDA, whose calls
/// may wait for a lock of the driver that another thread holds while it waits for the very kernel that hangs: a
/// watcher that asks an event hangs along with it.
class StreamProgress {
 public:
  explicit StreamProgress(const std::string& doing);  ///< on the current device; @throws CollectiveError
  /// What is queued in `stream` by now has passed when has_passed() says so of the number returned. One thread.
  uint32_t mark(cudaStream_t stream, const std::string& doing);
  bool has_passed(uint32_t number) const;  ///< any thread

 private:
  struct Free {
    void operator()(std::atomic<uint32_t>* memory) const noexcept { cudaFreeHost(memory); }
  };
  std::unique_ptr<std::atomic<uint32_t>, Free> passed_;
  uint32_t marked_ = 0;
};

}  // namespace lockstep
