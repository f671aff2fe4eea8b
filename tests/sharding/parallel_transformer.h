#pragma once

#include <map>
#include <string>

#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>
#include <lockstep/sharding/context_parallel.h>
#include <lockstep/sharding/vocab_parallel.h>

namespace lockstep::test {

/// Two blocks with everything that can be cut wrongly: grouped keys, biases on both sides of a region, norms and
/// learned positions outside of it, RoPE, dropout, a tied head, a vocabulary and features that divide by nothing.
struct TransformerShape {
  int64_t vocab = 257, width = 48, heads = 12, kv_heads = 4, ffn_width = 41, batch = 2, length = 24;
  double dropout = 0;
  int64_t head_dim() const { return width / heads; }
};

class ParallelBlock : public torch::nn::Module {
 public:
  ParallelBlock(const TransformerShape& s, const TensorParallel& tp, const ContextParallel& cp, uint64_t number)
      : s_(s), tp_(tp), cp_(cp), number_(number) {
    const HeadSplit split = split_heads(s.heads, s.kv_heads, tp);
    const auto rows = scaled(split.heads, s.head_dim()), kv_rows = scaled(split.kv_heads, s.head_dim());
    const auto column = [&](const char* name, int64_t out, std::vector<Part> parts) {
      return register_module(name, std::make_shared<ColumnParallelLinear>(s.width, out, true, tp, std::move(parts)));
    };
    query_ = column("query", s.width, rows);
    key_ = column("key", s.kv_heads * s.head_dim(), kv_rows);
    value_ = column("value", s.kv_heads * s.head_dim(), kv_rows);
    gate_ = column("gate", s.ffn_width, {});
    up_ = column("up", s.ffn_width, {});
    projection_ = register_module("projection", std::make_shared<RowParallelLinear>(s.width, s.width, true, tp, rows));
    down_ = register_module("down", std::make_shared<RowParallelLinear>(s.ffn_width, s.width, true, tp));
    norm1_ = register_module("norm1", std::make_shared<nn::LayerNorm>(s.width));
    norm2_ = register_module("norm2", std::make_shared<nn::RmsNorm>(s.width));
  }

  at::Tensor forward(const at::Tensor& x_BTC, const at::Tensor& cosines, const at::Tensor& sines) {
    const auto drop = [&](const at::Tensor& y, uint64_t place) {
      return sequence_dropout(y, s_.dropout, true, 2 * number_ + place, cosines.size(0), tp_);
    };
    const auto heads = [&](const at::Tensor& y) { return y.view({y.size(0), y.size(1), -1, s_.head_dim()}); };
    const at::Tensor h = enter_region(norm1_->forward(x_BTC), tp_);
    const at::Tensor q = nn::rope(heads(query_->inside(h)), cosines, sines),
                     k = nn::rope(heads(key_->inside(h)), cosines, sines), v = heads(value_->inside(h));
    const at::Tensor x = x_BTC + drop(projection_->forward(ring_attention(q, k, v, /*causal=*/true, cp_)), 0);
    const at::Tensor f = enter_region(norm2_->forward(x), tp_);
    const at::Tensor gate = gate_->inside(f), up = up_->inside(f);
    return x + drop(down_->forward(nn::swiglu(gate, up)), 1);
  }

 private:
  TransformerShape s_;
  TensorParallel tp_;
  ContextParallel cp_;
  uint64_t number_;
  std::shared_ptr<ColumnParallelLinear> query_, key_, value_, gate_, up_;
  std::shared_ptr<RowParallelLinear> projection_, down_;
  std::shared_ptr<nn::LayerNorm> norm1_;
  std::shared_ptr<nn::RmsNorm> norm2_;
};

class ParallelTransformer : public torch::nn::Module {
 public:
  ParallelTransformer(const TransformerShape& s, const TensorParallel& tp, const ContextParallel& cp)
      : s_(s), tp_(tp), cp_(cp) {
    embedding_ = register_module("embedding", std::make_shared<VocabParallelEmbedding>(s.vocab, s.width, tp));
    positions_ = register_module("positions", std::make_shared<nn::Embedding>(s.length, s.width));
    for (uint64_t i = 0; i < 2; ++i)
      blocks_.push_back(register_module("block" + std::to_string(i), std::make_shared<ParallelBlock>(s, tp, cp, i)));
    norm_ = register_module("norm", std::make_shared<nn::LayerNorm>(s.width));
  }

  void initialize() {
    for (auto& item : named_parameters()) {
      for (const ParameterPlacement& placement : placements(*this, tp_)) {
        if (placement.name != item.key()) continue;
        fill_part(item.value(), placement, [&](const at::Tensor& whole) {
          nn::fill_normal(whole, 7, placement.name, 0.2);
          if (placement.name.find("norm") != std::string::npos) whole.detach().add_(1);
        });
      }
    }
  }

  /// The loss of this rank's tokens: the sum over the context axis is the whole loss.
  at::Tensor loss_sum(const at::Tensor& tokens_BT, const at::Tensor& targets_BT) {
    const at::Tensor tokens = context_slice(tokens_BT, 1, cp_), targets = context_slice(targets_BT, 1, cp_);
    const auto [all_cosines, all_sines] = nn::rope_tables(s_.length, s_.head_dim(), 10000);
    const at::Tensor cosines = context_slice(all_cosines, 0, cp_), sines = context_slice(all_sines, 0, cp_);
    const Part part = sequence_part(tokens.size(1), tp_);
    at::Tensor x =
        embedding_->forward(tokens) + context_slice(positions_->weight, 0, cp_).narrow(0, part.begin, part.size);
    for (const auto& block : blocks_) x = block->forward(x, cosines, sines);
    return vocab_parallel_cross_entropy_sum(norm_->forward(x), embedding_->weight, s_.vocab, targets, tp_);
  }

 private:
  TransformerShape s_;
  TensorParallel tp_;
  ContextParallel cp_;
  std::shared_ptr<VocabParallelEmbedding> embedding_;
  std::shared_ptr<nn::Embedding> positions_;
  std::vector<std::shared_ptr<ParallelBlock>> blocks_;
  std::shared_ptr<nn::LayerNorm> norm_;
};

/// The same from functions of runtime/nn alone, given the whole weights by name. In the same order, which decides in
/// what order backward adds.
inline at::Tensor plain_loss_sum(const TransformerShape& s, const std::map<std::string, at::Tensor>& weights,
                                 const at::Tensor& tokens_BT, const at::Tensor& targets_BT) {
  const auto w = [&](const std::string& name) { return weights.at(name); };
  const auto linear = [&](const std::string& name, const at::Tensor& x) {
    return nn::linear(x, w(name + ".weight"), w(name + ".bias"));
  };
  const auto heads = [&](const at::Tensor& y) { return y.view({y.size(0), y.size(1), -1, s.head_dim()}); };
  const auto [cosines, sines] = nn::rope_tables(s.length, s.head_dim(), 10000);
  at::Tensor x = at::embedding(w("embedding.weight"), tokens_BT) + w("positions.weight");
  for (uint64_t i = 0; i < 2; ++i) {
    const std::string block = "block" + std::to_string(i) + ".";
    const at::Tensor h = nn::layer_norm(x, w(block + "norm1.weight"), w(block + "norm1.bias"), 1e-5);
    const at::Tensor q = nn::rope(heads(linear(block + "query", h)), cosines, sines);
    const at::Tensor k = nn::rope(heads(linear(block + "key", h)), cosines, sines);
    const at::Tensor v = heads(linear(block + "value", h)), attended = nn::attention(q, k, v, /*causal=*/true);
    x = x + nn::dropout(linear(block + "projection", attended), s.dropout, true, 2 * i);
    const at::Tensor f = nn::rms_norm(x, w(block + "norm2.weight"), 1e-5);
    const at::Tensor gate = linear(block + "gate", f), up = linear(block + "up", f);
    x = x + nn::dropout(linear(block + "down", nn::swiglu(gate, up)), s.dropout, true, 2 * i + 1);
  }
  const at::Tensor last = nn::layer_norm(x, w("norm.weight"), w("norm.bias"), 1e-5);
  return nn::linear_cross_entropy_sum(last.view({-1, s.width}), w("embedding.weight"), targets_BT.reshape({-1}));
}

}  // namespace lockstep::test
