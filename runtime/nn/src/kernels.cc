#include "kernels.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "exponential.h"

// Each public kernel is compiled for three instruction sets; its body is an always-inlined template, so every clone
// gets its own. Sums go through kLanes partial sums in a fixed pattern, which lets the compiler vectorise them without
// changing the order it was told.
#if defined(LOCKSTEP_SANITIZED) || !defined(__x86_64__)
#define LOCKSTEP_CLONES
#else
#define LOCKSTEP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif

namespace lockstep::nn {
namespace {

constexpr int64_t kLanes = 32;

LOCKSTEP_INLINE float load(float value) { return value; }
LOCKSTEP_INLINE float load(Bf16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }
LOCKSTEP_INLINE void store(float* to, float value) { *to = value; }
LOCKSTEP_INLINE void store(
    Bf16* to, float value) {  // to nearest, ties to even; nan stays nan because its quiet bit survives the shift
  const auto bits = std::bit_cast<uint32_t>(value);
  *to = static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

LOCKSTEP_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

LOCKSTEP_INLINE float total(const float* partial) {
  float sum[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) sum[j] = partial[j];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) sum[j] += sum[j + width];
  }
  return sum[0];
}

// Sum of term(i) for i in [0, n), through kLanes partial sums.
template <typename Term>
LOCKSTEP_INLINE float lane_sum(int64_t n, Term term) {
  float partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) partial[j] += term(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) partial[j] += term(i + j);
  return total(partial);
}

template <typename X, typename Y>
LOCKSTEP_INLINE void norm_forward_body(const X* x, const float* weight, const float* bias, Y* y, float* means,
                                       float* rstds, NormShape shape) {
  const float inverse_dim = 1.0f / static_cast<float>(shape.dim);
  for (int64_t row = 0; row < shape.rows; ++row, x += shape.dim, y += shape.dim) {
    const float mean = shape.rms ? 0.0f : lane_sum(shape.dim, [&](int64_t i) { return load(x[i]); }) * inverse_dim;
    const float variance =
        lane_sum(shape.dim, [&](int64_t i) { return (load(x[i]) - mean) * (load(x[i]) - mean); }) * inverse_dim;
    const float rstd = 1.0f / __builtin_sqrtf(variance + shape.epsilon);
    means[row] = mean;
    rstds[row] = rstd;
    if (bias) {
      for (int64_t i = 0; i < shape.dim; ++i)
        store(y + i, __builtin_fmaf((load(x[i]) - mean) * rstd, weight[i], bias[i]));
    } else {
      for (int64_t i = 0; i < shape.dim; ++i) store(y + i, (load(x[i]) - mean) * rstd * weight[i]);
    }
  }
}

// With h = (x - mean) rstd and g = grad * weight: x_grad = rstd (g - mean(g) - h mean(g h)); mean(g) is left out for
// rms.
template <typename X, typename Y>
LOCKSTEP_INLINE void norm_backward_body(const Y* grad, const X* x, const float* weight, const float* means,
                                        const float* rstds, X* x_grad, float* weight_grad, float* bias_grad,
                                        NormShape shape) {
  const float inverse_dim = 1.0f / static_cast<float>(shape.dim);
  for (int64_t row = 0; row < shape.rows; ++row, x += shape.dim, grad += shape.dim, x_grad += shape.dim) {
    const float mean = means[row], rstd = rstds[row];
    const float g_mean =
        shape.rms ? 0.0f : lane_sum(shape.dim, [&](int64_t i) { return load(grad[i]) * weight[i]; }) * inverse_dim;
    const float gh_mean =
        lane_sum(shape.dim, [&](int64_t i) { return load(grad[i]) * weight[i] * ((load(x[i]) - mean) * rstd); }) *
        inverse_dim;
    for (int64_t i = 0; i < shape.dim; ++i) {
      const float h = (load(x[i]) - mean) * rstd, g = load(grad[i]);
      store(x_grad + i, rstd * (__builtin_fmaf(g, weight[i], -g_mean) - h * gh_mean));
      weight_grad[i] = __builtin_fmaf(g, h, weight_grad[i]);
    }
    if (bias_grad) {
      for (int64_t i = 0; i < shape.dim; ++i) bias_grad[i] += load(grad[i]);
    }
  }
}

constexpr float kGeluScale = 1.5957691216f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

template <typename T>
LOCKSTEP_INLINE void gelu_forward_body(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(x[i]);
    store(y + i, v * sigmoid(kGeluScale * v * __builtin_fmaf(kGeluCubic, v * v, 1.0f)));
  }
}

template <typename T>
LOCKSTEP_INLINE void gelu_backward_body(const T* grad, const T* x, T* x_grad, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(x[i]), square = v * v;
    const float s = sigmoid(kGeluScale * v * __builtin_fmaf(kGeluCubic, square, 1.0f));
    const float slope = kGeluScale * __builtin_fmaf(3.0f * kGeluCubic, square, 1.0f);
    store(x_grad + i, load(grad[i]) * __builtin_fmaf(v * s * (1.0f - s), slope, s));
  }
}

template <typename T>
LOCKSTEP_INLINE void swiglu_forward_body(const T* gate, const T* up, T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(gate[i]);
    store(y + i, g * sigmoid(g) * load(up[i]));
  }
}

template <typename T>
LOCKSTEP_INLINE void swiglu_backward_body(const T* grad, const T* gate, const T* up, T* gate_grad, T* up_grad,
                                          int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = load(gate[i]), d = load(grad[i]), s = sigmoid(g);
    store(up_grad + i, d * g * s);
    store(gate_grad + i, d * load(up[i]) * s * __builtin_fmaf(g, 1.0f - s, 1.0f));
  }
}

template <typename T>
LOCKSTEP_INLINE void rope_rows_body(const T* x, const float* cosines, const float* sines, T* y, int64_t heads,
                                    int64_t dim, float sign) {
  const int64_t half = dim / 2;
  for (int64_t head = 0; head < heads; ++head, x += dim, y += dim) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = load(x[i]), b = load(x[i + half]), sine = sign * sines[i];
      store(y + i, __builtin_fmaf(a, cosines[i], -(b * sine)));
      store(y + i + half, __builtin_fmaf(b, cosines[i], a * sine));
    }
  }
}

template <typename T>
LOCKSTEP_INLINE float cross_entropy_row_body(T* logits, int64_t vocab, int64_t target) {
  float largest = load(logits[0]);
  for (int64_t i = 1; i < vocab; ++i) largest = std::max(largest, load(logits[i]));
  const float right = load(logits[target]);
  const float sum = lane_sum(vocab, [&](int64_t i) { return exponential(load(logits[i]) - largest); });
  const float scale = 1.0f / sum;
  for (int64_t i = 0; i < vocab; ++i) store(logits + i, exponential(load(logits[i]) - largest) * scale);
  const float p = std::exp(right - largest) * scale;
  store(logits + target, p - 1.0f);
  return std::log(sum) - (right - largest);
}

template <typename T>
LOCKSTEP_INLINE void column_sums_body(const T* x, int64_t rows, int64_t columns, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += columns) {
    for (int64_t i = 0; i < columns; ++i) out[i] += load(x[i]);
  }
}

}  // namespace

// NOLINTBEGIN(bugprone-macro-parentheses): the arguments are types
#define LOCKSTEP_NORM(X, Y)                                                                                \
  LOCKSTEP_CLONES void norm_forward(const X* x, const float* weight, const float* bias, Y* y, float* mean, \
                                    float* rstd, NormShape shape) {                                        \
    norm_forward_body(x, weight, bias, y, mean, rstd, shape);                                              \
  }                                                                                                        \
  LOCKSTEP_CLONES void norm_backward(const Y* grad, const X* x, const float* weight, const float* mean,    \
                                     const float* rstd, X* x_grad, float* weight_grad, float* bias_grad,   \
                                     NormShape shape) {                                                    \
    norm_backward_body(grad, x, weight, mean, rstd, x_grad, weight_grad, bias_grad, shape);                \
  }
LOCKSTEP_NORM(float, float)
LOCKSTEP_NORM(float, Bf16)
LOCKSTEP_NORM(Bf16, Bf16)
LOCKSTEP_NORM(Bf16, float)

#define LOCKSTEP_ELEMENTWISE(T)                                                                             \
  LOCKSTEP_CLONES void gelu_forward(const T* x, T* y, int64_t n) { gelu_forward_body(x, y, n); }            \
  LOCKSTEP_CLONES void gelu_backward(const T* grad, const T* x, T* x_grad, int64_t n) {                     \
    gelu_backward_body(grad, x, x_grad, n);                                                                 \
  }                                                                                                         \
  LOCKSTEP_CLONES void swiglu_forward(const T* gate, const T* up, T* y, int64_t n) {                        \
    swiglu_forward_body(gate, up, y, n);                                                                    \
  }                                                                                                         \
  LOCKSTEP_CLONES void swiglu_backward(const T* grad, const T* gate, const T* up, T* gate_grad, T* up_grad, \
                                       int64_t n) {                                                         \
    swiglu_backward_body(grad, gate, up, gate_grad, up_grad, n);                                            \
  }                                                                                                         \
  LOCKSTEP_CLONES void rope_rows(const T* x, const float* cosines, const float* sines, T* y, int64_t heads, \
                                 int64_t dim, float sign) {                                                 \
    rope_rows_body(x, cosines, sines, y, heads, dim, sign);                                                 \
  }                                                                                                         \
  LOCKSTEP_CLONES float cross_entropy_row(T* logits, int64_t vocab, int64_t target) {                       \
    return cross_entropy_row_body(logits, vocab, target);                                                   \
  }                                                                                                         \
  LOCKSTEP_CLONES void column_sums(const T* x, int64_t rows, int64_t columns, float* out) {                 \
    column_sums_body(x, rows, columns, out);                                                                \
  }
LOCKSTEP_ELEMENTWISE(float)
LOCKSTEP_ELEMENTWISE(Bf16)
// NOLINTEND(bugprone-macro-parentheses)

}  // namespace lockstep::nn
