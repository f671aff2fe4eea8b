#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/parameter.h>
#include <lockstep/sharding/tensor_parallel.h>

#include "rank_sum.h"

namespace lockstep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What a graph keeps of its group.
struct KeptParallel : torch::CustomClassHolder {
  explicit KeptParallel(const TensorParallel& parallel) : tp(parallel) {}
  TensorParallel tp;
};

void keep(AutogradContext* ctx, const TensorParallel& tp) {
  ctx->saved_data["tp"] = c10::IValue::make_capsule(c10::make_intrusive<KeptParallel>(tp));
}
TensorParallel kept(AutogradContext* ctx) {
  return c10::static_intrusive_pointer_cast<KeptParallel>(ctx->saved_data["tp"].toCapsule())->tp;
}

metrics::TraceSpan span(const char* name, const at::Tensor& x, const TensorParallel& tp) {
  return {tp.track, name, "collective", {"bytes", static_cast<int64_t>(x.nbytes())}};
}

at::Tensor sum(const at::Tensor& x, const TensorParallel& tp) {
  const auto traced = span("tensor-parallel sum", x, tp);
  return sum_over_ranks(*tp.group, x, tp.timeout);
}

// [B, T/t, C] of each rank -> [B, T, C].
at::Tensor gathered(const at::Tensor& x, const TensorParallel& tp) {
  const auto traced = span("sequence-parallel gather", x, tp);
  return gather_ranks(*tp.group, x, tp.timeout).transpose(0, 1).flatten(1, 2);  // [t, B, T/t, C] from the ranks
}

void check_length(int64_t length, const TensorParallel& tp) {
  if (length % tp.size() == 0) return;
  throw ConfigError("a sequence of " + std::to_string(length) + " tokens can not be shared by " +
                    std::to_string(tp.size()) + " ranks; make --sequence_length a multiple of " +
                    "--tensor_parallel_size, or drop --sequence_parallel");
}

// [B, T, C] -> [t, B, T/t, C]: the tokens of each rank.
at::Tensor by_rank(const at::Tensor& x, const TensorParallel& tp) {
  check_length(x.size(1), tp);
  return x.unflatten(1, {tp.size(), x.size(1) / tp.size()}).transpose(0, 1);
}

at::Tensor summed_tokens(const at::Tensor& x, const TensorParallel& tp) {
  const auto traced = span("sequence-parallel sum", x, tp);
  return sum_scattered(*tp.group, by_rank(x, tp), tp.timeout);
}

struct CopyTo : Function<CopyTo> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const TensorParallel& tp) {
    keep(ctx, tp);
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {sum(grads[0], kept(ctx)), at::Tensor()};
  }
};

struct ReduceFrom : Function<ReduceFrom> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& x, const TensorParallel& tp) { return sum(x, tp); }
  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0], at::Tensor()}; }
};

struct GatherSequence : Function<GatherSequence> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const TensorParallel& tp) {
    keep(ctx, tp);
    return gathered(x, tp);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {summed_tokens(grads[0], kept(ctx)), at::Tensor()};
  }
};

struct ReduceScatterSequence : Function<ReduceScatterSequence> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const TensorParallel& tp) {
    keep(ctx, tp);
    return summed_tokens(x, tp);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {gathered(grads[0], kept(ctx)), at::Tensor()};
  }
};

struct ScatterSequence : Function<ScatterSequence> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const TensorParallel& tp) {
    keep(ctx, tp);
    return by_rank(x, tp)[tp.rank()].contiguous();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {gathered(grads[0], kept(ctx)), at::Tensor()};
  }
};

// x + bias in x's dtype; the bias gradient is summed in f32.
struct AddBias : Function<AddBias> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& x, const at::Tensor& bias) {
    return x + bias.to(x.scalar_type());
  }
  static variable_list backward(AutogradContext*, const variable_list& grads) {
    return {grads[0], at::sum(grads[0].reshape({-1, grads[0].size(-1)}), 0, /*keepdim=*/false, at::kFloat)};
  }
};

bool has_replicas(const std::vector<Part>& parts, int rank) {
  return std::count(parts.begin(), parts.end(), parts[rank]) > 1;
}

std::vector<Part> parts_or_even(std::vector<Part> parts, int64_t total, const TensorParallel& tp) {
  if (parts.empty()) parts = even_parts(total, tp.size());
  LOCKSTEP_CHECK(static_cast<int>(parts.size()) == tp.size())
      << parts.size() << " parts of a dim for " << tp.size() << " ranks";
  for (const Part& part : parts) {
    LOCKSTEP_CHECK(part.begin >= 0 && part.size > 0 && part.begin + part.size <= total)
        << "part [" << part.begin << ", " << part.begin + part.size << ") of a dim of " << total;
  }
  return parts;
}

}  // namespace

at::Tensor copy_to(const at::Tensor& x, const TensorParallel& tp) {
  return tp.is_parallel() ? CopyTo::apply(x, tp) : x;
}
at::Tensor reduce_from(const at::Tensor& x, const TensorParallel& tp) {
  return tp.is_parallel() ? ReduceFrom::apply(x, tp) : x;
}
at::Tensor gather_sequence(const at::Tensor& x_BTC, const TensorParallel& tp) {
  return tp.is_parallel() ? GatherSequence::apply(x_BTC, tp) : x_BTC;
}
at::Tensor reduce_scatter_sequence(const at::Tensor& x_BTC, const TensorParallel& tp) {
  return tp.is_parallel() ? ReduceScatterSequence::apply(x_BTC, tp) : x_BTC;
}
at::Tensor scatter_sequence(const at::Tensor& x_BTC, const TensorParallel& tp) {
  return tp.is_parallel() ? ScatterSequence::apply(x_BTC, tp) : x_BTC;
}
at::Tensor enter_region(const at::Tensor& x_BTC, const TensorParallel& tp) {
  return tp.sequence_parallel ? gather_sequence(x_BTC, tp) : copy_to(x_BTC, tp);
}
at::Tensor leave_region(const at::Tensor& x_BTC, const TensorParallel& tp) {
  return tp.sequence_parallel ? reduce_scatter_sequence(x_BTC, tp) : reduce_from(x_BTC, tp);
}

Part sequence_part(int64_t length, const TensorParallel& tp) {
  if (!tp.is_sequence_parallel()) return {0, length};
  check_length(length, tp);
  return {tp.rank() * (length / tp.size()), length / tp.size()};
}

at::Tensor sequence_dropout(const at::Tensor& x_BTC, double p, bool training, uint64_t layer, int64_t length,
                            const TensorParallel& tp) {
  if (!training || p <= 0 || !tp.is_sequence_parallel()) return nn::dropout(x_BTC, p, training, layer);
  const Part part = sequence_part(length, tp);
  const at::Tensor ones = at::ones({x_BTC.size(0), length, x_BTC.size(2)}, x_BTC.options().requires_grad(false));
  return x_BTC * nn::dropout(ones, p, training, layer).narrow(1, part.begin, part.size);
}

ColumnParallelLinear::ColumnParallelLinear(int64_t in, int64_t out, bool has_bias, const TensorParallel& tp,
                                           std::vector<Part> parts)
    : tp_(tp), in_(in), out_(out), parts_(parts_or_even(std::move(parts), out, tp)) {
  const int64_t mine = parts_[tp.rank()].size;
  weight = register_parameter("weight", nn::new_parameter({mine, in}));
  if (has_bias) bias = register_parameter("bias", nn::new_parameter({mine}));
}

at::Tensor ColumnParallelLinear::inside(const at::Tensor& x_BTC) { return nn::linear(x_BTC, weight, bias); }

ParameterPlacement ColumnParallelLinear::placement(const std::string& own_name) const {
  ParameterPlacement placement;
  placement.shape = own_name == "weight" ? std::vector{out_, in_} : std::vector{out_};
  placement.tensor_dim = 0;
  placement.parts = parts_;
  placement.is_partial = has_replicas(parts_, tp_.rank());  // replicas see other query heads
  return placement;
}

RowParallelLinear::RowParallelLinear(int64_t in, int64_t out, bool has_bias, const TensorParallel& tp,
                                     std::vector<Part> parts)
    : tp_(tp), in_(in), out_(out), parts_(parts_or_even(std::move(parts), in, tp)) {
  LOCKSTEP_CHECK(!has_replicas(parts_, tp.rank())) << "a feature of two ranks would be summed twice";
  weight = register_parameter("weight", nn::new_parameter({out, parts_[tp.rank()].size}));
  if (has_bias) bias = register_parameter("bias", nn::new_parameter({out}));
}

at::Tensor RowParallelLinear::forward(const at::Tensor& x_BTF) {
  if (!tp_.is_parallel()) return nn::linear(x_BTF, weight, bias);
  const at::Tensor y = leave_region(nn::linear(x_BTF, weight, at::Tensor()), tp_);
  return bias.defined() ? AddBias::apply(y, bias) : y;
}

ParameterPlacement RowParallelLinear::placement(const std::string& own_name) const {
  ParameterPlacement placement;
  if (own_name == "bias") {
    placement.shape = {out_};
    placement.is_partial = tp_.is_sequence_parallel();
    return placement;
  }
  placement.shape = {out_, in_};
  placement.tensor_dim = 1;
  placement.parts = parts_;
  return placement;
}

HeadSplit split_heads(int64_t heads, int64_t kv_heads, const TensorParallel& tp) {
  const int64_t size = tp.size(), group = heads / kv_heads;
  HeadSplit split;
  if (kv_heads >= size) {
    split.kv_heads = even_parts(kv_heads, tp.size());
    split.heads = scaled(split.kv_heads, group);
  } else if (size % kv_heads == 0 && heads % size == 0) {
    split.heads = even_parts(heads, tp.size());
    for (int64_t rank = 0; rank < size; ++rank) split.kv_heads.push_back({rank / (size / kv_heads), 1});
  } else {
    throw ConfigError("heads " + std::to_string(heads) + " with kv_heads " + std::to_string(kv_heads) +
                      " can not be shared by " + std::to_string(size) +
                      " ranks; --tensor_parallel_size must be at most kv_heads, or a multiple of kv_heads that " +
                      "divides heads");
  }
  split.my_heads = split.heads[tp.rank()];
  split.my_kv_heads = split.kv_heads[tp.rank()];
  return split;
}

}  // namespace lockstep
