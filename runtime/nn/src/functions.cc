#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/precision.h>
#include <lockstep/nn/remake.h>

#include "data.h"
#include "weight_cache.h"

namespace lockstep::nn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr int64_t kLogitBytes = 2 << 20;  // logits of one chunk of rows: the second-level cache

// Calls body(T()) with the kernels' element type of a tensor.
template <typename Body>
auto with_type(const at::Tensor& tensor, Body body) {
  if (tensor.scalar_type() == at::kBFloat16) return body(Bf16());
  return body(float());
}

struct Gelu : Function<Gelu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input) {
    const at::Tensor x = input.contiguous();
    ctx->save_for_backward({x});
    at::Tensor y = at::empty_like(x);
    with_type(x, [&]<typename T>(T) { gelu_forward(data<T>(x), mutable_data<T>(y), x.numel()); });
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor x = ctx->get_saved_variables()[0], grad = grads[0].to(x.scalar_type()).contiguous();
    at::Tensor x_grad = at::empty_like(x);
    with_type(x, [&]<typename T>(T) { gelu_backward(data<T>(grad), data<T>(x), mutable_data<T>(x_grad), x.numel()); });
    return {x_grad};
  }
};

struct SwiGlu : Function<SwiGlu> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_in, const at::Tensor& up_in) {
    const at::Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
    ctx->save_for_backward({gate, up});
    at::Tensor y = at::empty_like(gate);
    with_type(gate,
              [&]<typename T>(T) { swiglu_forward(data<T>(gate), data<T>(up), mutable_data<T>(y), gate.numel()); });
    return y;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &gate = saved[0], &up = saved[1], grad = grads[0].to(gate.scalar_type()).contiguous();
    at::Tensor gate_grad = at::empty_like(gate), up_grad = at::empty_like(up);
    with_type(gate, [&]<typename T>(T) {
      swiglu_backward(data<T>(grad), data<T>(gate), data<T>(up), mutable_data<T>(gate_grad), mutable_data<T>(up_grad),
                      gate.numel());
    });
    return {gate_grad, up_grad};
  }
};

at::Tensor rotated(const at::Tensor& input, const at::Tensor& cosines, const at::Tensor& sines, float sign) {
  const at::Tensor x = input.contiguous();
  at::Tensor y = at::empty_like(x);
  const int64_t length = x.size(1), heads = x.size(2), dim = x.size(3), row = heads * dim;
  with_type(x, [&]<typename T>(T) {
    for (int64_t i = 0; i < x.size(0) * length; ++i) {
      const int64_t angle = i % length * (dim / 2);
      rope_rows(data<T>(x) + i * row, data<float>(cosines) + angle, data<float>(sines) + angle,
                mutable_data<T>(y) + i * row, heads, dim, sign);
    }
  });
  return y;
}

struct Rope : Function<Rope> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cosines,
                            const at::Tensor& sines) {
    ctx->save_for_backward({cosines, sines});
    return rotated(x, cosines, sines, 1.0f);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {  // a rotation's gradient turns back
    const auto saved = ctx->get_saved_variables();
    return {rotated(grads[0], saved[0], saved[1], -1.0f), at::Tensor(), at::Tensor()};
  }
};

void check_targets(const at::Tensor& targets, int64_t rows) {
  LOCKSTEP_CHECK(targets.is_cpu() && targets.scalar_type() == at::kLong && targets.dim() == 1 &&
                 targets.size(0) == rows)
      << "targets " << targets.sizes() << " " << targets.scalar_type() << " for " << rows
      << " rows: they must be i64 [N]";
}

// Loss of the rows of `logits`, which become the gradient of the loss.
double consume_logits(at::Tensor& logits, const int64_t* targets, int64_t vocab) {
  double loss = 0;
  with_type(logits, [&]<typename T>(T) {
    T* row = mutable_data<T>(logits);
    for (int64_t i = 0; i < logits.size(0); ++i, row += vocab) {
      if (targets[i] == kIgnore) {
        std::fill_n(row, vocab, T(0));
        continue;
      }
      LOCKSTEP_CHECK(targets[i] >= 0 && targets[i] < vocab)
          << "target " << targets[i] << " outside " << vocab << " classes";
      loss += cross_entropy_row(row, vocab, targets[i]);
    }
  });
  return loss;
}

// Gradients are made in the forward pass, for a gradient of 1, and scaled in the backward one.
struct LinearCrossEntropy : Function<LinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_in, const at::Tensor& weight,
                            const at::Tensor& targets_in, bool with_grad) {
    const bool bf16 = is_bf16() || x_in.scalar_type() == at::kBFloat16;  // asked first: the guard hides autocast
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor x = bf16 ? x_in.to(at::kBFloat16) : x_in, w = bf16 ? bf16_weight(weight) : weight,
                     targets = targets_in.contiguous();
    const int64_t rows = x.size(0), vocab = w.size(0);
    const int64_t chunk =
        std::max<int64_t>(1, std::min(rows, kLogitBytes / (vocab * static_cast<int64_t>(x.element_size()))));
    const bool x_needs = with_grad && x_in.requires_grad(), w_needs = with_grad && weight.requires_grad();
    at::Tensor x_grad = x_needs ? at::empty_like(x) : at::Tensor(), w_grad;
    if (w_needs && rows == 0) w_grad = at::zeros_like(weight);
    double loss = 0;
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t n = std::min(chunk, rows - begin);
      const at::Tensor part = x.narrow(0, begin, n);
      at::Tensor logits = at::mm(part, w.t());
      loss += consume_logits(logits, targets.const_data_ptr<int64_t>() + begin, vocab);
      if (x_needs) {
        at::Tensor out = x_grad.narrow(0, begin, n);
        at::mm_out(out, logits, w);
      }
      if (!w_needs) continue;
      if (!bf16 && w_grad.defined()) {
        w_grad.addmm_(logits.t(), part);
      } else {
        const at::Tensor piece = at::mm(logits.t(), part).to(at::kFloat);
        w_grad = w_grad.defined() ? w_grad.add_(piece) : piece;
      }
    }
    ctx->saved_data["x_is_f32"] = x_in.scalar_type() == at::kFloat;
    ctx->save_for_backward({x_grad, w_grad});
    return at::full({}, loss, x.options().dtype(at::kFloat));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto scale = static_cast<double>(grads[0].item<float>());
    at::Tensor x_grad, w_grad;
    if (saved[0].defined())
      x_grad = (ctx->saved_data["x_is_f32"].toBool() ? saved[0].to(at::kFloat) : saved[0]).mul(scale);
    if (saved[1].defined()) w_grad = saved[1].mul(scale);
    return {x_grad, w_grad, at::Tensor(), at::Tensor()};
  }
};

struct CrossEntropy : Function<CrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& logits_in, const at::Tensor& targets) {
    at::Tensor logits = logits_in.contiguous().clone();
    const double loss = consume_logits(logits, targets.contiguous().const_data_ptr<int64_t>(), logits.size(1));
    ctx->save_for_backward({logits});
    return at::full({}, loss, logits.options().dtype(at::kFloat));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {ctx->get_saved_variables()[0].mul(static_cast<double>(grads[0].item<float>())), at::Tensor()};
  }
};

}  // namespace

at::Tensor gelu(const at::Tensor& x) {
  return remakeable(has_kernel(x) ? Gelu::apply(x) : at::gelu(x, "tanh"), {x},
                    [](const auto& inputs) { return nn::gelu(inputs[0]); });
}

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  if (!has_kernel(gate)) return at::silu(gate) * up;
  LOCKSTEP_CHECK(up.sizes() == gate.sizes() && up.scalar_type() == gate.scalar_type() && up.is_cpu())
      << "swiglu of a gate " << gate.sizes() << " " << gate.scalar_type() << " and an up " << up.sizes() << " "
      << up.scalar_type() << ": they must be alike";
  return remakeable(SwiGlu::apply(gate, up), {gate, up},
                    [](const auto& inputs) { return nn::swiglu(inputs[0], inputs[1]); });
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines) {
  for (const at::Tensor& table : {cosines, sines}) {
    LOCKSTEP_CHECK(x.dim() == 4 && x.size(3) % 2 == 0 && table.sizes() == at::IntArrayRef({x.size(1), x.size(3) / 2}) &&
                   table.scalar_type() == at::kFloat && table.is_contiguous())
        << "rope of " << x.sizes() << " with a table " << table.sizes() << " " << table.scalar_type()
        << ": [B, T, heads, D] needs contiguous f32 tables [T, D/2], D even";
  }
  if (has_kernel(x)) {
    return remakeable(Rope::apply(x, cosines, sines), {x, cosines, sines},
                      [](const auto& inputs) { return nn::rope(inputs[0], inputs[1], inputs[2]); });
  }
  const at::Tensor cosine = cosines.to(x.device()).view({1, x.size(1), 1, x.size(3) / 2}),
                   sine = sines.to(x.device()).view({1, x.size(1), 1, x.size(3) / 2});
  const auto halves = x.chunk(2, -1);
  return at::cat({halves[0] * cosine - halves[1] * sine, halves[1] * cosine + halves[0] * sine}, -1)
      .to(x.scalar_type());
}

std::pair<at::Tensor, at::Tensor> rope_tables(int64_t length, int64_t head_dim, double theta) {
  const at::Tensor frequencies =
      at::pow(theta, -at::arange(0, head_dim, 2, at::kDouble) / static_cast<double>(head_dim));
  const at::Tensor angles = at::outer(at::arange(length, at::kDouble), frequencies);
  return {angles.cos().to(at::kFloat).contiguous(), angles.sin().to(at::kFloat).contiguous()};
}

at::Tensor linear_cross_entropy_sum(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets) {
  if (!has_kernel(x))
    return at::cross_entropy_loss(at::linear(x, weight).to(at::kFloat), targets, {}, at::Reduction::Sum, kIgnore);
  LOCKSTEP_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == x.size(1))
      << "cross-entropy of x " << x.sizes() << " with a weight " << weight.sizes()
      << ": they must be [N, C] and [V, C]";
  check_targets(targets, x.size(0));
  // Inside a Function gradients are off and tensors still say that they require one.
  return LinearCrossEntropy::apply(x, weight, targets, at::GradMode::is_enabled());
}

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& targets) {
  if (!has_kernel(logits)) return at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum, kIgnore);
  LOCKSTEP_CHECK(logits.dim() == 2 && logits.size(1) > 0) << "cross-entropy of logits " << logits.sizes();
  check_targets(targets, logits.size(0));
  return CrossEntropy::apply(logits, targets);
}

}  // namespace lockstep::nn
