#pragma once

#include <cstdint>

namespace lockstep::nn {

/// The query heads of one sample that share one head of keys and values.
struct AttentionShape {
  int64_t queries, keys, heads, dim;
  bool causal;  ///< query i sees keys 0 .. i
  float scale;  ///< of a score; positive
};

/// A tensor's values for these heads: [token, head, dim] with dense rows. Steps are in elements.
template <typename T>
struct Heads {
  T* data;
  int64_t token_step, head_step;  ///< keys and values have one head

  T* row(int64_t token, int64_t head) const { return data + token * token_step + head * head_step; }
};

/// Whether this CPU has the instructions (AVX-512) and the kernel this head size.
bool has_attention_kernel(int64_t dim);

/// f32, on one thread; the bits depend on values and shape only, never on addresses, strides or another sample or head.
/// `scratch` has attention_scratch_elements(), aligned to 64 bytes for speed; keys >= 1.
int64_t attention_scratch_elements(const AttentionShape& shape);
/// @param log_sums  [heads, queries]: logarithms of the sums of exponentials, for backward.
void attention_forward(Heads<const float> q, Heads<const float> k, Heads<const float> v, Heads<float> out,
                       float* log_sums, const AttentionShape& shape, float* scratch);

struct AttentionGrads {
  Heads<float> q, k, v;  ///< written, not added to
};
void attention_backward(Heads<const float> grad, Heads<const float> q, Heads<const float> k, Heads<const float> v,
                        Heads<const float> out, const float* log_sums, AttentionGrads grads,
                        const AttentionShape& shape, float* scratch);

}  // namespace lockstep::nn
