#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/nn/linear.h>
#include <lockstep/nn/parameter.h>
#include <lockstep/nn/precision.h>

#include "kernels.h"
#include "weight_cache.h"

namespace lockstep::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

at::Tensor rows_of(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// Columns of a bf16 [N, C] matrix summed in f32.
at::Tensor column_sums_f32(const at::Tensor& x) {
  at::Tensor sums = at::zeros({x.size(1)}, x.options().dtype(at::kFloat));
  const at::Tensor dense = x.contiguous();
  column_sums(reinterpret_cast<const Bf16*>(dense.const_data_ptr<at::BFloat16>()), x.size(0), x.size(1),
              sums.mutable_data_ptr<float>());
  return sums;
}

// MKL takes its AVX2 kernels on every CPU but Intel's; oneDNN's with AVX-512 are a tenth faster there, once a product
// is large enough for what a call costs more.
bool is_for_onednn(int64_t products) {
  static const bool is_cpu = __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_is("intel") == 0;
  constexpr int64_t kMinProducts = int64_t{1} << 24;
  return is_cpu && products >= kMinProducts;
}

// x weight^T + bias, f32.
at::Tensor onednn_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  using Attributes = c10::List<std::optional<at::Scalar>>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                               std::string_view, Attributes, std::optional<std::string_view>)>();
  const at::AutoDispatchBelowAutograd no_autograd;
  return op.call(x, weight, bias, "none", Attributes(), "");
}

struct OnednnLinear : Function<OnednnLinear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["has_bias"] = bias.has_value();
    return onednn_linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const at::Tensor g = rows_of(grads[0]);
    at::Tensor x_grad, w_grad, b_grad;
    if (ctx->needs_input_grad(0)) x_grad = onednn_linear(g, weight.t(), std::nullopt).view(x.sizes());
    if (ctx->needs_input_grad(1)) w_grad = at::mm(g.t(), rows_of(x));
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) b_grad = g.sum(0);
    return {x_grad, w_grad, b_grad};
  }
};

struct Bf16Linear : Function<Bf16Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& maybe_bias) {
    const at::Tensor bias = maybe_bias.value_or(at::Tensor());
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor x16 = x.to(at::kBFloat16), w16 = bf16_weight(weight);
    ctx->save_for_backward({x16, w16});
    ctx->saved_data["has_bias"] = bias.defined();
    ctx->saved_data["x_is_f32"] = x.scalar_type() == at::kFloat;
    return at::linear(x16, w16, bias.defined() ? bf16_weight(bias) : bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &w = saved[1];
    const at::Tensor g = rows_of(grads[0].to(at::kBFloat16));
    at::Tensor x_grad, w_grad, b_grad;
    if (ctx->needs_input_grad(0)) {
      x_grad = at::mm(g, w).view(x.sizes());
      if (ctx->saved_data["x_is_f32"].toBool()) x_grad = x_grad.to(at::kFloat);
    }
    if (ctx->needs_input_grad(1)) w_grad = at::mm(g.t(), rows_of(x)).to(at::kFloat);
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) b_grad = column_sums_f32(g);
    return {x_grad, w_grad, b_grad};
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const auto maybe_bias = bias.defined() ? std::optional(bias) : std::nullopt;
  if (x.is_cpu() && is_bf16()) return Bf16Linear::apply(x, weight, maybe_bias);
  if (x.is_cpu() && x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
      is_for_onednn(x.numel() * weight.size(0)))
    return OnednnLinear::apply(x, weight, maybe_bias);
  return at::linear(x, weight, bias);
}

Linear::Linear(int64_t in, int64_t out, bool has_bias) {
  weight = register_parameter("weight", new_parameter({out, in}));
  if (has_bias) bias = register_parameter("bias", new_parameter({out}));
}

Embedding::Embedding(int64_t vocab, int64_t dim) { weight = register_parameter("weight", new_parameter({vocab, dim})); }

}  // namespace lockstep::nn
