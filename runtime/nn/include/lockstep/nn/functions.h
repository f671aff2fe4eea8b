#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace lockstep::nn {

/// x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)): GELU in its tanh form, the one GPT-2 uses. f32 or bf16, one pass each
/// way.
at::Tensor gelu(const at::Tensor& x);

/// silu(gate) * up, one pass each way. Equal shapes and dtypes.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);

/// Causal or full attention. q [B, T, heads, D]; k, v [B, T, kv_heads, D] with heads a multiple of kv_heads; any
/// strides; those with dense rows are read where they are. With another number of keys than queries, causal lets query
/// i see keys 0 .. i, as LibTorch does.
/// @return [B, T, heads * D].
/// Threads: heads are shared out over LibTorch's. Source of the f32 kernel: FlashAttention-2, Dao, arXiv:2307.08691.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal);

/// Rotary position embedding of x [B, T, heads, D]: pairs are halves (i, i + D/2), as in Llama. Tables [T, D/2] f32
/// from rope_tables(). Source: Su et al., arXiv:2104.09864.
at::Tensor rope(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines);
std::pair<at::Tensor, at::Tensor> rope_tables(int64_t length, int64_t head_dim, double theta);

/// Sum over rows of cross-entropy(x weight^T, target). The logits exist a few rows at a time only, and gradients are
/// made on the way forward while they are in cache. Rows whose target is kIgnore count nothing.
/// @param x [N, C], weight [V, C] f32, targets [N] i64. @return f32 scalar.
inline constexpr int64_t kIgnore = -100;
at::Tensor linear_cross_entropy_sum(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets);
/// The same on logits [N, V].
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& targets);

}  // namespace lockstep::nn
