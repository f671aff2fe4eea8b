#pragma once

#include <type_traits>

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace lockstep::nn {

/// A tensor's memory as the kernels' element type (bf16 as its bits).
template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

/// Whether the kernels take it: f32 and bf16 on CPUs. LibTorch does the rest.
inline bool has_kernel(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

}  // namespace lockstep::nn
