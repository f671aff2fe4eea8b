// What import and export share: the configuration in our words and in theirs.
#include "hugging_face_task.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <type_traits>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>

namespace lockstep::format {
namespace {

using nlohmann::json;
using Json = nlohmann::ordered_json;

// The value of a member of exactly this kind; get() alone would convert 1e300 to a whole number.
template <typename T>
bool take(const json& value, T& target) {
  bool fits = false;
  if constexpr (std::is_same_v<T, bool>) fits = value.is_boolean();
  if constexpr (std::is_same_v<T, int64_t>) fits = value.is_number_integer();
  if constexpr (std::is_same_v<T, double>) fits = value.is_number();
  if constexpr (std::is_same_v<T, std::string>) fits = value.is_string();
  if (fits) target = value.get<T>();
  return fits;
}

std::string torch_name(const std::string& dtype) {
  return dtype == "F32" ? "float32" : dtype == "F16" ? "float16" : "bfloat16";
}

}  // namespace

std::string task_of(const HuggingFaceConfig& c) {
  return Json({{"task.model", c.family},
               {"task.layers", c.layers},
               {"task.width", c.width},
               {"task.heads", c.heads},
               {"task.kv_heads", c.kv_heads},
               {"task.ffn_width", c.ffn_width},
               {"task.vocab_size", c.vocab_size},
               {"task.sequence_length", c.sequence_length},
               {"task.tied_head", c.tied_head},
               {"task.norm_epsilon", c.norm_epsilon},
               {"task.rope_theta", c.rope_theta}})
      .dump();
}

HuggingFaceConfig config_of_task(const Manifest& manifest, const std::string& what) {
  const json task = json::parse(manifest.config_json);
  const auto read = [&](const char* key, auto& target, bool may_lack = false) {
    const auto found = task.find(std::string("task.") + key);
    if (found == task.end() ? may_lack : take(*found, target)) return;
    throw ConfigError(what + " has no configuration of examples/gpt ('task." + key +
                      "'). Mend: only its models can be exported");
  };
  HuggingFaceConfig config;
  int64_t experts = 0;
  read("model", config.family);
  read("tied_head", config.tied_head);
  read("norm_epsilon", config.norm_epsilon, true);
  read("rope_theta", config.rope_theta, true);
  read("experts", experts, true);
  const auto size = [&](const char* key, int64_t& target, int64_t limit = std::numeric_limits<int32_t>::max()) {
    read(key, target);
    if (target < 1 || target > limit)
      throw ConfigError(what + " says that " + key + " is " + std::to_string(target) + ", not from 1 to " +
                        std::to_string(limit));
  };
  size("layers", config.layers, static_cast<int64_t>(manifest.tensors.size()));
  size("width", config.width);
  size("heads", config.heads);
  size("kv_heads", config.kv_heads);
  size("ffn_width", config.ffn_width);
  size("vocab_size", config.vocab_size);
  size("sequence_length", config.sequence_length);
  if (config.family != "gpt2" && config.family != "llama")
    throw ConfigError(what + " is of the model family '" + config.family + "'; gpt2 and llama can be exported");
  if (experts > 0) throw ConfigError(what + " is a mixture of experts, which neither GPT-2's nor Llama's folders hold");
  return config;
}

std::string import_record(const std::string& dtype) {
  return Json({{"imported_from", "Hugging Face"}, {"imported_dtype", dtype}}).dump();
}

// Keys of transformers 5 and of older versions side by side, so that both read it. Token ids of the vocabulary's
// special words are the tokenizer's to say; the architectures' defaults would name words that this vocabulary may not
// have.
std::string hugging_face_config_text(const HuggingFaceConfig& c, const std::string& dtype) {
  const bool is_gpt2 = c.family == "gpt2";
  Json json = {{"architectures", {is_gpt2 ? "GPT2LMHeadModel" : "LlamaForCausalLM"}},
               {"model_type", c.family},
               {"vocab_size", c.vocab_size},
               {"tie_word_embeddings", c.tied_head},
               {"bos_token_id", nullptr},
               {"eos_token_id", nullptr},
               {"dtype", torch_name(dtype)},
               {"torch_dtype", torch_name(dtype)}};
  if (is_gpt2) {
    json.update({{"n_layer", c.layers},
                 {"n_embd", c.width},
                 {"n_head", c.heads},
                 {"n_inner", c.ffn_width},
                 {"n_positions", c.sequence_length},
                 {"n_ctx", c.sequence_length},
                 {"layer_norm_epsilon", c.norm_epsilon},
                 {"activation_function", "gelu_new"}});
  } else {
    json.update({{"num_hidden_layers", c.layers},
                 {"hidden_size", c.width},
                 {"num_attention_heads", c.heads},
                 {"num_key_value_heads", c.kv_heads},
                 {"head_dim", c.width / c.heads},
                 {"intermediate_size", c.ffn_width},
                 {"max_position_embeddings", c.sequence_length},
                 {"rms_norm_eps", c.norm_epsilon},
                 {"rope_theta", c.rope_theta},
                 {"rope_parameters", {{"rope_theta", c.rope_theta}, {"rope_type", "default"}}},
                 {"hidden_act", "silu"},
                 {"attention_bias", false},
                 {"mlp_bias", false}});
  }
  return json.dump(2) + "\n";
}

std::string number_text(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}

void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  constexpr int64_t kTile = 32;  // rows and columns of a tile share cache lines
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
      for (int64_t c = c0; c < std::min(c0 + kTile, columns); ++c) {
        for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r) to[c * to_stride + r] = from[r * from_stride + c];
      }
    }
  }
}

}  // namespace lockstep::format
