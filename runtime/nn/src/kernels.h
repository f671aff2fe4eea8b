#pragma once

#include <cstdint>

namespace lockstep::nn {

/// bf16 values as their bits. All kernels run on one thread, are elementwise or sum in a fixed order, and do not depend
/// on addresses.
using Bf16 = uint16_t;

struct NormShape {
  int64_t rows, dim;
  float epsilon;
  bool rms;  ///< no mean, no bias
};

#define LOCKSTEP_NORM(X, Y)                                                                                           \
  void norm_forward(const X* x, const float* weight, const float* bias, Y* y, float* mean, float* rstd,               \
                    NormShape shape);                                                                                 \
  /* weight_grad and bias_grad are added to; bias_grad may be null */                                                 \
  void norm_backward(const Y* grad, const X* x, const float* weight, const float* mean, const float* rstd, X* x_grad, \
                     float* weight_grad, float* bias_grad, NormShape shape);
LOCKSTEP_NORM(float, float)
LOCKSTEP_NORM(float, Bf16)
LOCKSTEP_NORM(Bf16, Bf16)
LOCKSTEP_NORM(Bf16, float)
#undef LOCKSTEP_NORM

#define LOCKSTEP_ELEMENTWISE(T)                                                                                       \
  void gelu_forward(const T* x, T* y, int64_t n);                                                                     \
  void gelu_backward(const T* grad, const T* x, T* x_grad, int64_t n);                                                \
  void swiglu_forward(const T* gate, const T* up, T* y, int64_t n);                                                   \
  void swiglu_backward(const T* grad, const T* gate, const T* up, T* gate_grad, T* up_grad, int64_t n);               \
  /* rows of [heads, dim] each with its own angle row; sign -1 turns back */                                          \
  void rope_rows(const T* x, const float* cosines, const float* sines, T* y, int64_t heads, int64_t dim, float sign); \
  /* one row of logits: returns the loss and replaces the row by softmax - onehot(target) */                          \
  float cross_entropy_row(T* logits, int64_t vocab, int64_t target);                                                  \
  /* out[j] += sum over rows */                                                                                       \
  void column_sums(const T* x, int64_t rows, int64_t columns, float* out);
LOCKSTEP_ELEMENTWISE(float)
LOCKSTEP_ELEMENTWISE(Bf16)
#undef LOCKSTEP_ELEMENTWISE

}  // namespace lockstep::nn
