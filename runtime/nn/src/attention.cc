#include <cmath>

#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/nn/functions.h>
#include <lockstep/nn/precision.h>

#include "attention_kernel.h"
#include "data.h"

namespace lockstep::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool has_bf16_tiles() {
  const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto found = capabilities.find("amx_bf16");  // x86's alone
  return found != capabilities.end() && found->second.toBool();
}

// LibTorch's kernel on a CPU makes its products of small pieces, at half of what ours reaches; in bf16 it is slower
// still, so that bf16 is widened for ours, but for CPUs whose tiles multiply bf16.
bool has_kernel(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  static const bool has_tiles = has_bf16_tiles();
  const at::ScalarType dtype = q.scalar_type();
  for (const at::Tensor& x : {q, k, v}) {
    if (!x.is_cpu() || x.scalar_type() != dtype || x.dim() != 4 || x.numel() == 0) return false;
  }
  return (dtype == at::kBFloat16 ? !has_tiles : dtype == at::kFloat && !is_bf16()) && k.sizes() == v.sizes() &&
         q.size(0) == k.size(0) && q.size(2) % k.size(2) == 0 && q.size(3) == k.size(3) &&
         has_attention_kernel(q.size(3));
}

at::Tensor f32_rows(const at::Tensor& x) {
  const at::Tensor wide = x.to(at::kFloat);
  return wide.stride(-1) == 1 ? wide : wide.contiguous();
}

// Sample `batch` of x [B, T, heads, D] from `head` on.
template <typename T>
Heads<T> heads_of(const at::Tensor& x, int64_t batch, int64_t head) {
  T* data;
  if constexpr (std::is_const_v<T>) {
    data = x.const_data_ptr<float>();
  } else {
    data = x.mutable_data_ptr<float>();
  }
  return {data + batch * x.stride(0) + head * x.stride(2), x.stride(1), x.stride(2)};
}

AttentionShape shape_of(const at::Tensor& q, const at::Tensor& k, bool causal) {
  return {.queries = q.size(1),
          .keys = k.size(1),
          .heads = q.size(2) / k.size(2),
          .dim = q.size(3),
          .causal = causal,
          .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(q.size(3))))};
}

// Calls body(batch, head of k and v, scratch) for all of them, on LibTorch's threads.
template <typename Body>
void for_each_head(const at::Tensor& k, const AttentionShape& shape, Body body) {
  const int64_t heads = k.size(2);
  at::parallel_for(0, k.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({attention_scratch_elements(shape)}, at::kFloat);
    for (int64_t i = begin; i < end; ++i) body(i / heads, i % heads, scratch.mutable_data_ptr<float>());
  });
}

struct Attention : Function<Attention> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_in, const at::Tensor& k_in,
                            const at::Tensor& v_in, bool causal) {
    const at::Tensor q = f32_rows(q_in), k = f32_rows(k_in), v = f32_rows(v_in);
    const AttentionShape shape = shape_of(q, k, causal);
    at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2) * q.size(3)}, q.options());
    at::Tensor log_sums = at::empty({q.size(0), q.size(2), q.size(1)}, q.options());
    const at::Tensor out_heads = out.view(q.sizes());
    for_each_head(k, shape, [&](int64_t batch, int64_t kv_head, float* scratch) {
      const int64_t head = kv_head * shape.heads;
      attention_forward(heads_of<const float>(q, batch, head), heads_of<const float>(k, batch, kv_head),
                        heads_of<const float>(v, batch, kv_head), heads_of<float>(out_heads, batch, head),
                        log_sums.mutable_data_ptr<float>() + (batch * q.size(2) + head) * q.size(1), shape, scratch);
    });
    ctx->saved_data["causal"] = causal;
    out = out.to(q_in.scalar_type());
    ctx->save_for_backward({q_in, k_in, v_in, out, log_sums});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::ScalarType dtype = saved[0].scalar_type();
    const at::Tensor q = f32_rows(saved[0]), k = f32_rows(saved[1]), v = f32_rows(saved[2]), &log_sums = saved[4];
    const at::Tensor out = f32_rows(saved[3].view(q.sizes())), grad = f32_rows(grads[0].view(q.sizes()));
    const AttentionShape shape = shape_of(q, k, ctx->saved_data["causal"].toBool());
    const at::Tensor q_grad = at::empty(q.sizes(), q.options()), k_grad = at::empty(k.sizes(), k.options()),
                     v_grad = at::empty(v.sizes(), v.options());
    for_each_head(k, shape, [&](int64_t batch, int64_t kv_head, float* scratch) {
      const int64_t head = kv_head * shape.heads;
      attention_backward(heads_of<const float>(grad, batch, head), heads_of<const float>(q, batch, head),
                         heads_of<const float>(k, batch, kv_head), heads_of<const float>(v, batch, kv_head),
                         heads_of<const float>(out, batch, head),
                         log_sums.const_data_ptr<float>() + (batch * q.size(2) + head) * q.size(1),
                         {heads_of<float>(q_grad, batch, head), heads_of<float>(k_grad, batch, kv_head),
                          heads_of<float>(v_grad, batch, kv_head)},
                         shape, scratch);
    });
    return {q_grad.to(dtype), k_grad.to(dtype), v_grad.to(dtype), at::Tensor()};
  }
};

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  if (has_kernel(q, k, v)) return Attention::apply(q, k, v, causal);
  const bool grouped = q.size(2) != k.size(2);
  const at::Tensor out =
      at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), /*attn_mask=*/{},
                                       /*dropout_p=*/0.0, causal, /*scale=*/std::nullopt, /*enable_gqa=*/grouped);
  return out.transpose(1, 2).reshape({q.size(0), q.size(1), q.size(2) * q.size(3)});
}

}  // namespace lockstep::nn
