#pragma once

#include <cstddef>
#include <span>

#include <ATen/core/Tensor.h>

namespace lockstep::checkpoint {

/// The memory of a contiguous CPU tensor.
std::span<std::byte> bytes_of(const at::Tensor& tensor);

}  // namespace lockstep::checkpoint
