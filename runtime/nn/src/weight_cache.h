#pragma once

#include <ATen/core/Tensor.h>

namespace lockstep::nn {

/// A bf16 copy of a weight, without graph: cast anew, or taken from this generation's copies inside a WeightCacheScope.
at::Tensor bf16_weight(const at::Tensor& weight);

}  // namespace lockstep::nn
