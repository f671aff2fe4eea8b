#include "kernels.h"

#include <cmath>

// Clones for each instruction set; sanitizers run before ifuncs can resolve.
#if defined(LOCKSTEP_SANITIZED) || !defined(__x86_64__)
#define LOCKSTEP_CLONES
#else
#define LOCKSTEP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

namespace lockstep::optim {

LOCKSTEP_CLONES void adamw(float* __restrict parameter, const float* __restrict grad, float* __restrict exp_avg,
                           float* __restrict exp_avg_sq, int64_t n, const AdamWConstants& constants) {
  const AdamWConstants c = constants;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * c.grad_scale;
    const float m = __builtin_fmaf(c.one_minus_beta1, g, c.beta1 * exp_avg[i]);
    const float v = __builtin_fmaf(c.one_minus_beta2, g * g, c.beta2 * exp_avg_sq[i]);
    const float denominator = __builtin_fmaf(__builtin_sqrtf(v), c.inverse_root_c2, c.epsilon);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    parameter[i] = __builtin_fmaf(-c.step_size, m / denominator, parameter[i] * c.keep);
  }
}

LOCKSTEP_CLONES void sgd(float* __restrict parameter, const float* __restrict grad, float* __restrict momentum_buffer,
                         int64_t n, const SgdConstants& constants) {
  const SgdConstants c = constants;
  for (int64_t i = 0; i < n; ++i) {
    const float g = __builtin_fmaf(c.weight_decay, parameter[i], grad[i] * c.grad_scale);
    const float m = __builtin_fmaf(c.momentum, momentum_buffer[i], g);
    const float direction = c.nesterov ? __builtin_fmaf(c.momentum, m, g) : m;
    momentum_buffer[i] = m;
    parameter[i] = __builtin_fmaf(-c.learning_rate, direction, parameter[i]);
  }
}

}  // namespace lockstep::optim
