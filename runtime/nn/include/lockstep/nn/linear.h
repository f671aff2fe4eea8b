#pragma once

#include <ATen/ops/embedding.h>
#include <torch/nn/module.h>

namespace lockstep::nn {

/// y = x weight^T + bias on the last dim. Under bf16: bf16 products and output, f32 gradients of weight and bias.
/// @param weight [out, in] f32. @param bias [out] f32 or undefined.
/// Why not at::linear: under autocast LibTorch casts the weight on every call and sums bias gradients in bf16; in f32
/// it knows MKL alone, which oneDNN outruns on CPUs of other makers than Intel.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias);

/// Parameters "weight" [out, in] and, unless `bias` is false, "bias" [out]. Left for initialisation by the task.
class Linear : public torch::nn::Module {
 public:
  Linear(int64_t in, int64_t out, bool bias = true);
  at::Tensor forward(const at::Tensor& x) { return linear(x, weight, bias); }

  at::Tensor weight, bias;
};

/// Rows of "weight" [vocab, dim] f32 at `ids`; on one thread the gradient is summed in order of position.
class Embedding : public torch::nn::Module {
 public:
  Embedding(int64_t vocab, int64_t dim);
  at::Tensor forward(const at::Tensor& ids) { return at::embedding(weight, ids); }

  at::Tensor weight;
};

}  // namespace lockstep::nn
