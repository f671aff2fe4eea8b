#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/norm.h>
#include <lockstep/nn/precision.h>
#include <lockstep/nn/remake.h>

#include "data.h"

namespace lockstep::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <typename X, typename Y>
void forward_kernel(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, at::Tensor& y,
                    at::Tensor& mean, at::Tensor& rstd, NormShape shape) {
  norm_forward(data<X>(x), data<float>(weight), bias.defined() ? data<float>(bias) : nullptr, mutable_data<Y>(y),
               mutable_data<float>(mean), mutable_data<float>(rstd), shape);
}

template <typename X, typename Y>
void backward_kernel(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& mean,
                     const at::Tensor& rstd, at::Tensor& x_grad, at::Tensor& weight_grad, at::Tensor& bias_grad,
                     NormShape shape) {
  norm_backward(data<Y>(grad), data<X>(x), data<float>(weight), data<float>(mean), data<float>(rstd),
                mutable_data<X>(x_grad), mutable_data<float>(weight_grad),
                bias_grad.defined() ? mutable_data<float>(bias_grad) : nullptr, shape);
}

struct Norm : Function<Norm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& maybe_bias, double epsilon, bool rms) {
    const at::Tensor bias = maybe_bias.value_or(at::Tensor()), x = input.contiguous();
    const NormShape shape{x.numel() / x.size(-1), x.size(-1), static_cast<float>(epsilon), rms};
    const bool x16 = x.scalar_type() == at::kBFloat16, y16 = is_bf16() || x16;
    at::Tensor y = at::empty(x.sizes(), x.options().dtype(y16 ? at::kBFloat16 : at::kFloat));
    at::Tensor mean = at::empty({shape.rows}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
    const auto kernel = x16   ? &forward_kernel<Bf16, Bf16>
                        : y16 ? &forward_kernel<float, Bf16>
                              : &forward_kernel<float, float>;
    kernel(x, weight, bias, y, mean, rstd, shape);
    ctx->save_for_backward({x, weight, mean, rstd});
    ctx->saved_data["epsilon"] = epsilon;
    ctx->saved_data["rms"] = rms;
    ctx->saved_data["has_bias"] = bias.defined();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const NormShape shape{x.numel() / x.size(-1), x.size(-1), static_cast<float>(ctx->saved_data["epsilon"].toDouble()),
                          ctx->saved_data["rms"].toBool()};
    const at::Tensor grad = grads[0].contiguous();
    at::Tensor x_grad = at::empty_like(x), weight_grad = at::zeros_like(weight), bias_grad;
    if (ctx->saved_data["has_bias"].toBool()) bias_grad = at::zeros_like(weight);
    const bool x16 = x.scalar_type() == at::kBFloat16, y16 = grad.scalar_type() == at::kBFloat16;
    const auto kernel = x16 ? (y16 ? &backward_kernel<Bf16, Bf16> : &backward_kernel<Bf16, float>)
                            : (y16 ? &backward_kernel<float, Bf16> : &backward_kernel<float, float>);
    kernel(grad, x, weight, saved[2], saved[3], x_grad, weight_grad, bias_grad, shape);
    return {x_grad, weight_grad, bias_grad, at::Tensor(), at::Tensor()};
  }
};

// The kernels read it by address.
void check_scale(const char* what, const at::Tensor& scale, const at::Tensor& x) {
  LOCKSTEP_CHECK(x.dim() > 0 && x.size(-1) > 0) << "norm over an empty last dim of " << x.sizes();
  LOCKSTEP_CHECK(scale.is_cpu() && scale.scalar_type() == at::kFloat && scale.is_contiguous() &&
                 scale.numel() == x.size(-1))
      << "norm " << what << " of sizes " << scale.sizes() << ", " << scale.scalar_type()
      << ": it must be contiguous f32 on the CPU, as long as the last dim of " << x.sizes();
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double epsilon) {
  if (!has_kernel(x)) return at::layer_norm(x, {x.size(-1)}, weight, bias, epsilon);
  check_scale("weight", weight, x);
  check_scale("bias", bias, x);
  return remakeable(Norm::apply(x, weight, std::optional(bias), epsilon, /*rms=*/false), {x, weight, bias},
                    [epsilon](const auto& inputs) { return nn::layer_norm(inputs[0], inputs[1], inputs[2], epsilon); });
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon) {
  if (!has_kernel(x)) return at::rms_norm(x, {x.size(-1)}, weight, epsilon);
  check_scale("weight", weight, x);
  return remakeable(Norm::apply(x, weight, std::nullopt, epsilon, /*rms=*/true), {x, weight},
                    [epsilon](const auto& inputs) { return nn::rms_norm(inputs[0], inputs[1], epsilon); });
}

LayerNorm::LayerNorm(int64_t dim, double epsilon) : epsilon_(epsilon) {
  weight = register_parameter("weight", at::ones({dim}));
  bias = register_parameter("bias", at::zeros({dim}));
}

RmsNorm::RmsNorm(int64_t dim, double epsilon) : epsilon_(epsilon) {
  weight = register_parameter("weight", at::ones({dim}));
}

}  // namespace lockstep::nn
