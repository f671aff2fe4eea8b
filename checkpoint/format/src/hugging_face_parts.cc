// Which tensor of ours is which part of one of theirs.
#include <lockstep/format/hugging_face.h>

namespace lockstep::format {
namespace {

class Parts {
 public:
  void add(const std::string& name, const std::string& theirs, const std::vector<int64_t>& shape) {
    parts_.push_back({.name = name, .shape = shape, .theirs = theirs, .their_shape = shape});
  }
  // LayerNorm or RMSNorm.
  void add_norm(const std::string& name, const std::string& theirs, int64_t width, bool bias) {
    add(name + ".weight", theirs + ".weight", {width});
    if (bias) add(name + ".bias", theirs + ".bias", {width});
  }
  // A Conv1D of GPT-2 that is one or more linear layers of ours, of `out` rows each.
  void add_conv(const std::vector<std::string>& names, const std::string& theirs, int64_t in, int64_t out) {
    const int64_t total = out * static_cast<int64_t>(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
      parts_.push_back({names[i] + ".weight", {out, in}, theirs + ".weight", {in, total}, true, begin(i, out)});
    }
    for (size_t i = 0; i < names.size(); ++i)
      parts_.push_back({names[i] + ".bias", {out}, theirs + ".bias", {total}, false, begin(i, out)});
  }
  std::vector<HuggingFacePart> take() { return std::move(parts_); }

 private:
  static int64_t begin(size_t i, int64_t out) { return static_cast<int64_t>(i) * out; }
  std::vector<HuggingFacePart> parts_;
};

void add_gpt2(const HuggingFaceConfig& c, Parts& parts) {
  parts.add("embedding.tokens.weight", "wte.weight", {c.vocab_size, c.width});
  parts.add("embedding.positions", "wpe.weight", {c.sequence_length, c.width});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string ours = "block" + std::to_string(i) + ".", theirs = "h." + std::to_string(i) + ".";
    parts.add_norm(ours + "norm1", theirs + "ln_1", c.width, true);
    parts.add_conv({ours + "query", ours + "key", ours + "value"}, theirs + "attn.c_attn", c.width, c.width);
    parts.add_conv({ours + "projection"}, theirs + "attn.c_proj", c.width, c.width);
    parts.add_norm(ours + "norm2", theirs + "ln_2", c.width, true);
    parts.add_conv({ours + "up"}, theirs + "mlp.c_fc", c.width, c.ffn_width);
    parts.add_conv({ours + "down"}, theirs + "mlp.c_proj", c.ffn_width, c.width);
  }
  parts.add_norm("head.norm", "ln_f", c.width, true);
}

void add_llama(const HuggingFaceConfig& c, Parts& parts) {
  const int64_t kv_width = c.width / c.heads * c.kv_heads;
  parts.add("embedding.tokens.weight", "embed_tokens.weight", {c.vocab_size, c.width});
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string ours = "block" + std::to_string(i) + ".", theirs = "layers." + std::to_string(i) + ".";
    parts.add_norm(ours + "norm1", theirs + "input_layernorm", c.width, false);
    parts.add(ours + "query.weight", theirs + "self_attn.q_proj.weight", {c.width, c.width});
    parts.add(ours + "key.weight", theirs + "self_attn.k_proj.weight", {kv_width, c.width});
    parts.add(ours + "value.weight", theirs + "self_attn.v_proj.weight", {kv_width, c.width});
    parts.add(ours + "projection.weight", theirs + "self_attn.o_proj.weight", {c.width, c.width});
    parts.add_norm(ours + "norm2", theirs + "post_attention_layernorm", c.width, false);
    parts.add(ours + "gate.weight", theirs + "mlp.gate_proj.weight", {c.ffn_width, c.width});
    parts.add(ours + "up.weight", theirs + "mlp.up_proj.weight", {c.ffn_width, c.width});
    parts.add(ours + "down.weight", theirs + "mlp.down_proj.weight", {c.width, c.ffn_width});
  }
  parts.add_norm("head.norm", "norm", c.width, false);
}

}  // namespace

std::vector<HuggingFacePart> hugging_face_parts(const HuggingFaceConfig& config) {
  Parts parts;
  (config.family == "gpt2" ? add_gpt2 : add_llama)(config, parts);
  if (!config.tied_head) parts.add("head.output.weight", "lm_head.weight", {config.vocab_size, config.width});
  return parts.take();
}

}  // namespace lockstep::format
