#include "stream_progress.h"

#include <new>

#include <lockstep/base/error.h>

#include "nccl_communicator.h"

namespace lockstep {
namespace {

// The driver's own, as cuda.h declares it, which CUDA's runtime wheel does not bring.
using WriteValue = int (*)(cudaStream_t stream, unsigned long long address, uint32_t value, unsigned flags);
constexpr unsigned kDriverVersion = 12000;  // the oldest with this form of it

WriteValue write_value() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state{};
    check_cuda(
        cudaGetDriverEntryPointByVersion("cuStreamWriteValue32", &found, kDriverVersion, cudaEnableDefault, &state),
        "looking for cuStreamWriteValue32");
    if (found == nullptr)
      throw ConfigError("the CUDA driver has no cuStreamWriteValue32. Mend: a driver for CUDA 12 or newer");
    return reinterpret_cast<WriteValue>(found);
  }();
  return function;
}

}  // namespace

StreamProgress::StreamProgress(const std::string& doing) {
  void* memory = nullptr;
  check_cuda(cudaHostAlloc(&memory, sizeof(std::atomic<uint32_t>), cudaHostAllocPortable | cudaHostAllocMapped), doing);
  passed_.reset(new (memory) std::atomic<uint32_t>(0));
}

uint32_t StreamProgress::mark(cudaStream_t stream, const std::string& doing) {
  const int code = write_value()(stream, reinterpret_cast<uintptr_t>(passed_.get()), ++marked_, /*flags=*/0);
  if (code != 0) throw CollectiveError(doing + " failed: cuStreamWriteValue32 says " + std::to_string(code));
  return marked_;
}

// Numbers go round: the later one is less than half a turn ahead.
bool StreamProgress::has_passed(uint32_t number) const {
  return static_cast<int32_t>(passed_->load(std::memory_order_acquire) - number) >= 0;
}

}  // namespace lockstep
