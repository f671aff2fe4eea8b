#pragma once

#include <string>
#include <vector>

#include <lockstep/sharding/layer_stack.h>
#include <lockstep/sharding/model_parallel.h>

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
  double dropout = 0;
  double norm_epsilon = 1e-5;     ///< of LayerNorm and RMSNorm
  double rope_theta = 10000;      ///< llama: base of the rotary angles
  int64_t experts = 0;            ///< llama: feed-forward parts that a router chooses from in each block; 0: one, dense
  int64_t experts_per_token = 2;  ///< of them that a token goes to
  double moe_aux_weight = 0.01;   ///< of the loss that balances the experts' load
};

/// @throws lockstep::ConfigError sizes that do not divide, with the mend.
Config resolve(Config config);

/// Embedding, blocks, head: layers "embedding", "block0", ..., "head". Shapes: B samples, T tokens, C width, V
/// vocabulary. forward({tokens_BT, targets_BT}) is the loss, summed over tokens; forward({tokens_BT}) the logits
/// [B, T, V].
class Model : public lockstep::LayerStack {
 public:
  explicit Model(const Config& config, const lockstep::ModelParallel& parallel = {});
  const Config& config() const { return config_; }

 private:
  Config config_;
};

/// GPT-2's scheme: normal 0.02, projections into the residual stream scaled by 1 / sqrt(2 layers); each from its own
/// named stream.
void initialize(const Config& config, const std::string& name, const at::Tensor& parameter, uint64_t seed);

/// Continues `prompt` by `count` tokens, drawn with `temperature` among the `top_k` likeliest; random numbers are keyed
/// by `seed`.
std::vector<int64_t> generate(Model& model, std::vector<int64_t> prompt, int64_t count, double temperature,
                              int64_t top_k, uint64_t seed);

}  // namespace gpt
