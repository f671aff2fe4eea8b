#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include <lockstep/base/exact_sum.h>

namespace lockstep {

/// What a micro-batch without gradient contributes: -0.0 is addition's identity for every float, +0.0 would turn -0.0
/// into +0.0.
inline constexpr float kNothing = -0.0f;

// On contiguous f32 tensors of one device, seen as flat. On a CPU plain loops, so that every caller rounds alike; on a
// GPU LibTorch's kernels, on the current stream.

/// target[i] += term[i], and out[i] = a[i] + b[i]. out may be a or b.
void add_into(const at::Tensor& target, const at::Tensor& term);
void add_to(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

/// The same, a copy, and kNothing, for `numel` elements from the given places on.
void add_run(const at::Tensor& out, int64_t out_begin, const at::Tensor& a, const at::Tensor& b, int64_t begin,
             int64_t numel);
void copy_run(const at::Tensor& out, int64_t out_begin, const at::Tensor& in, int64_t begin, int64_t numel);
void fill_nothing(const at::Tensor& out, int64_t begin, int64_t numel);

/// The squares of all elements; the same bits whatever they are split into.
ExactSum squares_of(const std::vector<at::Tensor>& tensors);
/// The same by LibTorch's kernels, as squares_of() takes them on a GPU, where the host waits twice.
ExactSum squares_by_kernels(const std::vector<at::Tensor>& tensors);

}  // namespace lockstep
