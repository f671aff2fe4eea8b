#pragma once

#include <memory>

#include <cuda_runtime_api.h>

#include <lockstep/collectives/process_group.h>

#include "cuda_plugin.h"

namespace lockstep {

/// What the group asks of torch's CUDA half, of one device. A seam: tests answer it without a GPU.
class TorchDevice {
 public:
  virtual ~TorchDevice() = default;
  TorchDevice() = default;
  TorchDevice(const TorchDevice&) = delete;
  TorchDevice& operator=(const TorchDevice&) = delete;

  virtual cudaStream_t current_stream() const = 0;  ///< the calling thread's
  virtual bool holds(const at::Tensor& tensor) const = 0;
  /// The allocator may not hand the tensor's memory out again before `stream` has passed this point.
  virtual void keep_for(const at::Tensor& tensor, cudaStream_t stream) const = 0;
};

/// The world's group over NCCL. Collective.
///
/// Streams: a call takes effect after what is queued on the caller's stream, runs on the group's own stream, and wait()
/// makes the then current stream wait for it; the host waits for NCCL to take the work over, never for the GPU.
/// Host tensors (control data) travel too, by way of the device; wait() of those, and barrier(), do block the host.
/// Sends and receives leave together at the next wait(), poll() or other call of the group, so that two ranks that both
/// send first do not block each other. Tags are not sent: between two ranks the order of the calls matches them.
/// A thread watches what is in flight every `watch_interval`: a call whose deadline passes, or whose peer is lost,
/// aborts the group, and the next call, wait() or close() throws. It shares the process's fate: what stops the whole
/// process is the supervisor's to see.
std::unique_ptr<ProcessGroup> make_nccl_group(const NcclWorld& world, std::shared_ptr<const TorchDevice> torch,
                                              Milliseconds watch_interval = Milliseconds(100));

}  // namespace lockstep
