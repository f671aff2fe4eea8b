#include "flags.h"

#include <gflags/gflags.h>

DEFINE_string(model, "gpt2", "gpt2 (learned positions, LayerNorm, GELU) | llama (RoPE, RMSNorm, SwiGLU)");
DEFINE_int64(layers, 6, "transformer blocks");
DEFINE_int64(width, 384, "size of the residual stream");
DEFINE_int64(heads, 6, "attention heads");
DEFINE_int64(kv_heads, 0, "llama: key-value heads, shared by groups of heads; 0: as many as heads");
DEFINE_int64(ffn_width, 0, "width inside the feed-forward part; 0: the family's usual");
DEFINE_int64(vocab_size, 256, "token ids are below this; 256 for bytes");
DEFINE_int64(sequence_length, 256, "tokens a sample");
DEFINE_bool(tied_head, true, "output weights are the embedding's");
DEFINE_double(norm_epsilon, 1e-5, "added to the variance in LayerNorm and RMSNorm");
DEFINE_double(rope_theta, 10000, "llama: base of the rotary angles");
DEFINE_double(dropout, 0, "probability that an activation is dropped in training");
DEFINE_int64(experts, 0, "llama: feed-forward parts of a block, of which each token goes to a few; 0: one, dense");
DEFINE_int64(experts_per_token, 2, "with --experts: how many a token goes to");
DEFINE_double(moe_aux_weight, 0.01,
              "with --experts: weight of the loss that balances their load; not in the loss shown");
DEFINE_string(prompt, "", "after training, continue this text");
DEFINE_int64(generate_tokens, 0, "length of the continuation");
DEFINE_double(temperature, 0.8, "of the continuation: lower is more certain");
DEFINE_int64(top_k, 50, "of the continuation: draw among this many");
DECLARE_uint64(seed);

namespace gpt {

Flags flags() {
  return {.model = {.family = FLAGS_model,
                    .layers = FLAGS_layers,
                    .width = FLAGS_width,
                    .heads = FLAGS_heads,
                    .kv_heads = FLAGS_kv_heads,
                    .ffn_width = FLAGS_ffn_width,
                    .vocab_size = FLAGS_vocab_size,
                    .sequence_length = FLAGS_sequence_length,
                    .tied_head = FLAGS_tied_head,
                    .dropout = FLAGS_dropout,
                    .norm_epsilon = FLAGS_norm_epsilon,
                    .rope_theta = FLAGS_rope_theta,
                    .experts = FLAGS_experts,
                    .experts_per_token = FLAGS_experts_per_token,
                    .moe_aux_weight = FLAGS_moe_aux_weight},
          .prompt = FLAGS_prompt,
          .generate_tokens = FLAGS_generate_tokens,
          .temperature = FLAGS_temperature,
          .top_k = FLAGS_top_k,
          .seed = FLAGS_seed};
}

const char* flags_file() { return __FILE__; }

}  // namespace gpt
