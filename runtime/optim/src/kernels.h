#pragma once

#include <cstdint>

namespace lockstep::optim {

/// Constants of one AdamW step, each rounded to f32 once.
struct AdamWConstants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float grad_scale;       ///< the clip coefficient
  float keep;             ///< 1 - learning_rate * weight_decay
  float step_size;        ///< learning_rate / (1 - beta1^t)
  float inverse_root_c2;  ///< 1 / sqrt(1 - beta2^t)
  float epsilon;
};

/// Elementwise, so the bits of an element do not depend on where it stands in a slice, nor on the instruction set:
/// every multiply-add is written out as fma and the compiler may not make others (-ffp-contract=off).
void adamw(float* parameter, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n,
           const AdamWConstants& constants);

struct SgdConstants {
  float grad_scale, weight_decay, momentum, learning_rate;
  bool nesterov;
};
void sgd(float* parameter, const float* grad, float* momentum_buffer, int64_t n, const SgdConstants& constants);

}  // namespace lockstep::optim
