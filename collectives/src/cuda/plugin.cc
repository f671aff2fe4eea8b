// The plug-in's door, and the answers of torch's CUDA half to NcclGroup's questions.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda_plugin.h"
#include "nccl_group.h"

namespace lockstep {
namespace {

class CudaTorchDevice : public TorchDevice {
 public:
  explicit CudaTorchDevice(int device) : device_(static_cast<c10::DeviceIndex>(device)) {}

  cudaStream_t current_stream() const override { return c10::cuda::getCurrentCUDAStream(device_).stream(); }
  bool holds(const at::Tensor& tensor) const override { return tensor.is_cuda() && tensor.get_device() == device_; }
  void keep_for(const at::Tensor& tensor, cudaStream_t stream) const override {
    c10::cuda::CUDACachingAllocator::recordStream(tensor.storage().data_ptr(),
                                                  c10::cuda::getStreamFromExternal(stream, device_));
  }

 private:
  c10::DeviceIndex device_;
};

int device_count() { return c10::cuda::device_count(); }

void set_device(int device) { c10::cuda::set_device(static_cast<c10::DeviceIndex>(device)); }

std::unique_ptr<ProcessGroup> make_nccl_world(const NcclWorld& world) {
  return make_nccl_group(world, std::make_shared<CudaTorchDevice>(world.device));
}

constexpr CudaPlugin kPlugin{&device_count, &set_device, &make_nccl_world};

}  // namespace
}  // namespace lockstep

extern "C" __attribute__((visibility("default"))) const lockstep::CudaPlugin* lockstep_cuda_plugin(int version) {
  return version == lockstep::CudaPlugin::kVersion ? &lockstep::kPlugin : nullptr;
}
