#pragma once

#include <functional>
#include <limits>
#include <vector>

#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/counter_random.h>

#include "../../support/same_bits.h"

namespace lockstep::nn {

inline constexpr double kF32 = 0x1p-24;  // relative error of one rounding
inline constexpr double kBf16 = 0x1p-8;

/// Standard normal values, rounded to `type`.
inline at::Tensor normal(at::IntArrayRef sizes, uint64_t key, at::ScalarType type = at::kFloat) {
  at::Tensor x = at::empty(sizes, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i)
    x.mutable_data_ptr<float>()[i] = normal_at(stream_key(key, "test"), static_cast<uint64_t>(i));
  return x.to(type);
}

/// max |a - b| / max |b|: relative to the tensor, because relative to an element near zero it means nothing.
inline double error_of(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return std::numeric_limits<double>::infinity();
  if (a.numel() == 0) return 0;
  const double size = b.to(at::kDouble).abs().max().item<double>();
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>() / (size == 0 ? 1 : size);
}

using Tensors = std::vector<at::Tensor>;
using Formula = std::function<at::Tensor(const Tensors&)>;

/// The output of a formula and its gradients by each input, given the gradient of the output.
struct Pass {
  at::Tensor output;
  Tensors grads;
};
inline Pass run(const Formula& formula, const Tensors& inputs, const std::function<at::Tensor(at::Tensor)>& upstream) {
  Tensors leaves;
  for (const auto& input : inputs) leaves.push_back(input.detach().requires_grad_());  // keeps strides
  const at::Tensor output = formula(leaves);
  return {output.detach(), torch::autograd::grad({output}, leaves, {upstream(output)})};
}

/// How far a formula and its gradients are from `exact` in f64 on the same inputs, for a made-up gradient of the
/// output.
struct Errors {
  double output;
  std::vector<double> grads;
};
inline Errors errors(const Formula& ours, const Formula& exact, const Tensors& inputs) {
  const auto upstream = [&](const at::Tensor& output) {
    return normal(output.sizes(), 77, at::kBFloat16).to(output.scalar_type());
  };
  Tensors wide;
  for (const auto& input : inputs) wide.push_back(input.to(at::kDouble));
  const Pass a = run(ours, inputs, upstream), b = run(exact, wide, upstream);
  Errors all{error_of(a.output, b.output), {}};
  for (size_t i = 0; i < inputs.size(); ++i) all.grads.push_back(error_of(a.grads[i], b.grads[i]));
  return all;
}

}  // namespace lockstep::nn
