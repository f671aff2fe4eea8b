#pragma once

#include <string>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>

namespace gpt {

/// Two families of decoder-only transformers in one description.
struct Config {
  std::string family =
      "gpt2";  ///< gpt2: learned positions, LayerNorm, GELU, biases | llama: RoPE, RMSNorm, SwiGLU, no biases
  int64_t layers = 6, width = 384, heads = 6;
  int64_t kv_heads = 0;   ///< llama: key-value heads (grouped-query attention); 0: as many as heads
  int64_t ffn_width = 0;  ///< 0: 4 x width for gpt2, 8/3 x width rounded up to 64 for llama
  int64_t vocab_size = 256, sequence_length = 256;
  bool tied_head = true;
  double dropout = 0, rope_theta = 10000;
};

/// @throws lockstep::ConfigError sizes that do not divide, with the mend.
Config resolve(Config config);

/// Shapes: B samples, T tokens, C width, V vocabulary. A list of blocks "blocks.N", tensor in, tensor out.
class Model : public torch::nn::Module {
 public:
  explicit Model(const Config& config);
  ~Model() override;

  at::Tensor hidden(const at::Tensor& tokens_BT);  ///< [B, T, C], after the last norm
  at::Tensor loss_sum(const at::Tensor& tokens_BT, const at::Tensor& targets_BT);
  at::Tensor logits(const at::Tensor& hidden_BTC);

  /// GPT-2's scheme: normal 0.02, projections into the residual stream scaled by 1 / sqrt(2 layers); each from its own
  /// named stream.
  void initialize(uint64_t seed);

  const Config& config() const { return config_; }

 private:
  class Block;
  const at::Tensor& head_weight() const { return head_ ? head_->weight : embedding_->weight; }

  Config config_;
  std::shared_ptr<lockstep::nn::Embedding> embedding_, positions_;
  std::vector<std::shared_ptr<Block>> blocks_;
  std::shared_ptr<lockstep::nn::LayerNorm> layer_norm_;
  std::shared_ptr<lockstep::nn::RmsNorm> rms_norm_;
  std::shared_ptr<lockstep::nn::Linear> head_;
  at::Tensor cosines_, sines_;  // RoPE tables: constants, so no buffers of the checkpoint
};

/// Continues `prompt` by `count` tokens, drawn with `temperature` among the `top_k` likeliest; random numbers are keyed
/// by `seed`.
std::vector<int64_t> generate(Model& model, std::vector<int64_t> prompt, int64_t count, double temperature,
                              int64_t top_k, uint64_t seed);

}  // namespace gpt
