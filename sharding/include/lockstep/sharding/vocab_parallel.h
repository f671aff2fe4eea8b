#pragma once

#include <lockstep/sharding/tensor_parallel.h>

namespace lockstep {

/// Rows of "weight" [vocab, dim] at ids, each rank holding a part of the vocabulary (even_parts: any vocabulary).
///
/// @param ids_BT i64, equal on all ranks. @return [B, T, dim], or [B, T/t, dim] with sequence_parallel.
/// @throws CheckFailed an id outside the vocabulary.
class VocabParallelEmbedding : public torch::nn::Module, public Placed {
 public:
  VocabParallelEmbedding(int64_t vocab, int64_t dim, const TensorParallel& tp);
  at::Tensor forward(const at::Tensor& ids_BT);
  ParameterPlacement placement(const std::string& own_name) const override;

  at::Tensor weight;

 private:
  TensorParallel tp_;
  int64_t vocab_, dim_;
  std::vector<Part> parts_;
};

/// nn::linear_cross_entropy_sum with a head cut over ranks: the sum over tokens of cross-entropy(x weight^T, target),
/// the same value on every rank. Enters a tensor region by itself: x and its gradient are as outside of one.
///
/// Logits exist for a group of rows and this rank's part of the vocabulary only; for each group the ranks exchange a
/// maximum, a sum and the target's logit a row, in f32. A tied head passes the embedding's weight.
/// @param x_BTC [B, T, C], or [B, T/t, C] with sequence_parallel; without it also [N, C].
/// @param weight [part, C] f32, this rank's of even_parts(vocab, t). Or a ColumnParallelLinear's without bias.
/// @param targets_BT i64, of all tokens, any shape, equal on all ranks; nn::kIgnore counts nothing.
/// Cost: an all-gather of 12 bytes a row, one for each 16 MiB of logits; then as nn::linear_cross_entropy_sum / t.
at::Tensor vocab_parallel_cross_entropy_sum(const at::Tensor& x_BTC, const at::Tensor& weight, int64_t vocab,
                                            const at::Tensor& targets_BT, const TensorParallel& tp);

}  // namespace lockstep
