#pragma once

#include <torch/nn/module.h>

namespace lockstep::nn {

/// Layer norm over the last dim, statistics in f32; output bf16 under bf16, so that the next product needs no cast.
/// @param weight, bias [dim] f32. Source: Ba, Kiros, Hinton, arXiv:1607.06450.
at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double epsilon);
/// Without mean and bias. Source: Zhang & Sennrich, arXiv:1910.07467. LibTorch's falls apart into six passes under
/// autograd on a CPU.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon);

class LayerNorm : public torch::nn::Module {
 public:
  explicit LayerNorm(int64_t dim, double epsilon = 1e-5);
  at::Tensor forward(const at::Tensor& x) { return layer_norm(x, weight, bias, epsilon_); }
  at::Tensor weight, bias;

 private:
  double epsilon_;
};

class RmsNorm : public torch::nn::Module {
 public:
  explicit RmsNorm(int64_t dim, double epsilon = 1e-5);
  at::Tensor forward(const at::Tensor& x) { return rms_norm(x, weight, epsilon_); }
  at::Tensor weight;

 private:
  double epsilon_;
};

}  // namespace lockstep::nn
