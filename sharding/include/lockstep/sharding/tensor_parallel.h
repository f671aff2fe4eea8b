#pragma once

#include <torch/nn/module.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/metrics/trace.h>
#include <lockstep/sharding/parameter_placement.h>

namespace lockstep {

/// How layers are cut over the ranks of a tensor-parallel group. A null group, or one of size 1: they are not, and the
/// layers below are those of runtime/nn, with the same bits and cost.
///
/// Tensor region: between a column- and a row-parallel layer, where each rank has its own heads or features of all
/// tokens. Outside it activations are the same on all ranks or, with sequence_parallel, each rank has its own T/t of
/// the T tokens, so that norms, dropout and residuals cost a t-th in time and memory, for the same traffic.
/// Shapes: B samples, T tokens, C features; x_BTC is [B, T, C], or [B, T/t, C] outside a tensor region with
/// sequence_parallel. Sums are taken in f32 in rank order and rounded once to the tensor's dtype: every rank sees the
/// same bits, whatever the back end. The group must outlive graphs made with it, is used by one thread at a time, and
/// all ranks must build the same graph.
/// Source: Shoeybi et al., arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198.
struct TensorParallel {
  ProcessGroup* group = nullptr;
  bool sequence_parallel = false;
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
  metrics::TraceTrack track{};  ///< has a span for each exchange

  int size() const { return group ? group->size() : 1; }
  int rank() const { return group ? group->rank() : 0; }
  bool is_parallel() const { return size() > 1; }
  bool is_sequence_parallel() const { return sequence_parallel && is_parallel(); }
};

/// Forward: x itself; backward: the sum of the gradients over ranks.
at::Tensor copy_to(const at::Tensor& x, const TensorParallel& tp);
/// Forward: the sum over ranks; backward: the gradient itself.
at::Tensor reduce_from(const at::Tensor& x, const TensorParallel& tp);
/// Forward: [B, T/t, C] of each rank -> [B, T, C]; backward: each rank gets its tokens' sum of the gradients.
at::Tensor gather_sequence(const at::Tensor& x_BTC, const TensorParallel& tp);
/// Forward: this rank's tokens of the sum over ranks, [B, T, C] -> [B, T/t, C]; backward: gradients of all tokens.
/// @throws ConfigError T is no multiple of t.
at::Tensor reduce_scatter_sequence(const at::Tensor& x_BTC, const TensorParallel& tp);
/// Forward: this rank's tokens of an x that all ranks have; backward: gradients of all tokens.
at::Tensor scatter_sequence(const at::Tensor& x_BTC, const TensorParallel& tp);

/// Into a tensor region: gather_sequence or copy_to. Several column-parallel layers of one input share one entry.
at::Tensor enter_region(const at::Tensor& x_BTC, const TensorParallel& tp);
/// Out of a tensor region: reduce_scatter_sequence or reduce_from.
at::Tensor leave_region(const at::Tensor& x_BTC, const TensorParallel& tp);

/// The tokens of this rank outside tensor regions, of a sequence of `length`: all, or with sequence_parallel its T/t.
/// For what is added to activations there, e.g. rows of learned positions.
Part sequence_part(int64_t length, const TensorParallel& tp);

/// nn::dropout of x_BTC outside tensor regions: the elements that one rank would zero in [B, `length`, C].
at::Tensor sequence_dropout(const at::Tensor& x_BTC, double p, bool training, uint64_t layer, int64_t length,
                            const TensorParallel& tp);

/// Into a tensor region: y = x weight^T + bias, of which this rank computes its part of the features.
/// Parameters "weight" [part, in] and, unless `bias` is false, "bias" [part]; f32, left for initialisation by the task.
class ColumnParallelLinear : public torch::nn::Module, public Placed {
 public:
  /// @param parts of `out`, by rank: from split_heads(), e.g.; equal ones are replicas. Empty: even_parts.
  ColumnParallelLinear(int64_t in, int64_t out, bool bias, const TensorParallel& tp, std::vector<Part> parts = {});
  at::Tensor forward(const at::Tensor& x_BTC) { return inside(enter_region(x_BTC, tp_)); }
  at::Tensor inside(const at::Tensor& x_BTC);  ///< of an x that has entered the region
  ParameterPlacement placement(const std::string& own_name) const override;

  at::Tensor weight, bias;

 private:
  TensorParallel tp_;
  int64_t in_, out_;
  std::vector<Part> parts_;
};

/// Out of a tensor region: y = x weight^T + bias over the features of all ranks; x has this rank's part of them. The
/// bias is added once, after the sum. Parameters "weight" [out, part] and "bias" [out].
class RowParallelLinear : public torch::nn::Module, public Placed {
 public:
  /// @param parts of `in`, by rank; disjoint. Empty: even_parts.
  RowParallelLinear(int64_t in, int64_t out, bool bias, const TensorParallel& tp, std::vector<Part> parts = {});
  at::Tensor forward(const at::Tensor& x_BTF);
  ParameterPlacement placement(const std::string& own_name) const override;

  at::Tensor weight, bias;

 private:
  TensorParallel tp_;
  int64_t in_, out_;
  std::vector<Part> parts_;
};

/// Which attention heads each rank has. Whole groups of query heads go with their key-value head, as evenly as they
/// can; when there are fewer key-value heads than ranks, each is held by t / kv_heads of them, which share its query
/// heads. Query, key and value weights are parameters of their own, so that each part is one contiguous box (README).
struct HeadSplit {
  std::vector<Part> heads, kv_heads;  ///< by rank
  Part my_heads, my_kv_heads;
};
/// @throws ConfigError heads that can not be shared evenly, with the sizes that can.
HeadSplit split_heads(int64_t heads, int64_t kv_heads, const TensorParallel& tp);

}  // namespace lockstep
