// config.json and model.safetensors.index.json of Hugging Face folders, as text that may be hostile.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>

#include <lockstep/base/error.h>
#include <lockstep/format/hugging_face.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

#include "strict_json.h"

namespace lockstep::format {
namespace {

using nlohmann::json;
using Spellings = std::initializer_list<const char*>;

constexpr int64_t kMaxLayers = 10'000;
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();

// The members of a config, each under any of its names; null is as good as absent.
class Members {
 public:
  Members(const json& object, std::string what) : object_(object), what_(std::move(what)) {}

  const json* find(Spellings names) const {
    const json* found = nullptr;
    for (const char* name : names) {
      const auto here = object_.find(name);
      if (here == object_.end() || here->is_null()) continue;
      if (found != nullptr && *found != *here)
        throw CorruptData(what_ + " says " + found->dump() + " and, under '" + name + "', " + here->dump());
      found = &*here;
    }
    return found;
  }

  int64_t size(Spellings names, int64_t otherwise, int64_t limit = kMaxSize) const {
    const json* value = find(names);
    if (value == nullptr) return otherwise;
    // Compared in its own type: get<int64_t>() of a large unsigned number would wrap.
    const bool fits = value->is_number_unsigned() && value->get<uint64_t>() >= 1 &&
                      value->get<uint64_t>() <= static_cast<uint64_t>(limit);
    if (!fits) throw CorruptData(bad(names, *value) + ", no whole number from 1 to " + std::to_string(limit));
    return value->get<int64_t>();
  }

  double positive(Spellings names, double otherwise) const {
    const json* value = find(names);
    if (value == nullptr) return otherwise;
    if (!value->is_number() || !(value->get<double>() > 0) || !std::isfinite(value->get<double>()))
      throw CorruptData(bad(names, *value) + ", no positive number");
    return value->get<double>();
  }

  bool flag(Spellings names, bool otherwise) const {
    const json* value = find(names);
    if (value == nullptr) return otherwise;
    if (!value->is_boolean()) throw CorruptData(bad(names, *value) + ", neither true nor false");
    return value->get<bool>();
  }

  std::string text(Spellings names, const std::string& otherwise) const {
    const json* value = find(names);
    if (value == nullptr) return otherwise;
    if (!value->is_string()) throw CorruptData(bad(names, *value) + ", no text");
    return value->get<std::string>();
  }

  // A variant that the model does not compute must stop the import: its logits would be silently wrong.
  void require(bool ok, const char* name) const {
    if (ok) return;
    throw ConfigError(what_ + " has \"" + name + "\": " + object_.at(name).dump() +
                      ", a variant that examples/gpt does not compute");
  }

  const std::string& what() const { return what_; }

 private:
  std::string bad(Spellings names, const json& value) const {
    return what_ + " has \"" + *names.begin() + "\": " + value.dump().substr(0, 100);
  }

  const json& object_;
  std::string what_;
};

std::string family_of(const Members& members) {
  std::string type = members.text({"model_type"}, "");
  const json* architectures = members.find({"architectures"});
  if (type.empty() && architectures != nullptr && architectures->is_array() && !architectures->empty()) {
    const json& first = architectures->front();  // files of before 2020 have no model_type
    if (first == "GPT2LMHeadModel") type = "gpt2";
    if (first == "LlamaForCausalLM") type = "llama";
  }
  if (type == "gpt2" || type == "llama") return type;
  throw ConfigError(members.what() + " is of model_type '" + type.substr(0, 100) + "'; gpt2 and llama are known");
}

HuggingFaceConfig parse_gpt2(const Members& members) {
  HuggingFaceConfig config{.family = "gpt2"};
  config.layers = members.size({"n_layer", "num_hidden_layers"}, 12, kMaxLayers);
  config.width = members.size({"n_embd", "hidden_size"}, 768);
  config.heads = config.kv_heads = members.size({"n_head", "num_attention_heads"}, 12);
  config.ffn_width = members.size({"n_inner", "intermediate_size"}, 4 * config.width, 4 * kMaxSize);
  config.vocab_size = members.size({"vocab_size"}, 50257);
  config.sequence_length = members.size({"n_positions", "max_position_embeddings", "n_ctx"}, 1024);
  config.tied_head = members.flag({"tie_word_embeddings"}, true);
  config.norm_epsilon = members.positive({"layer_norm_epsilon", "layer_norm_eps"}, 1e-5);
  const std::string activation = members.text({"activation_function", "hidden_act"}, "gelu_new");
  if (activation != "gelu_new" && activation != "gelu_pytorch_tanh")
    throw ConfigError(members.what() + " has the activation '" + activation.substr(0, 100) +
                      "'; GPT-2 is computed with gelu_new, the tanh form");
  members.require(members.flag({"scale_attn_weights"}, true), "scale_attn_weights");
  members.require(!members.flag({"scale_attn_by_inverse_layer_idx"}, false), "scale_attn_by_inverse_layer_idx");
  members.require(!members.flag({"add_cross_attention"}, false), "add_cross_attention");
  return config;
}

// transformers 5 has rope_parameters {rope_theta, rope_type}, older ones rope_theta and rope_scaling {type or
// rope_type, factor, ...}.
double parse_rope(const Members& members) {
  std::optional<double> theta;
  if (members.find({"rope_theta"}) != nullptr) theta = members.positive({"rope_theta"}, 0);
  for (const char* name : {"rope_parameters", "rope_scaling"}) {
    const json* value = members.find({name});
    if (value == nullptr) continue;
    if (!value->is_object()) throw CorruptData(members.what() + ": '" + name + "' is no object");
    const Members rope(*value, members.what() + " (" + name + ")");
    members.require(rope.text({"rope_type", "type"}, "default") == "default", name);
    members.require(rope.positive({"partial_rotary_factor"}, 1) == 1, name);
    if (rope.find({"rope_theta"}) == nullptr) continue;
    const double here = rope.positive({"rope_theta"}, 0);
    if (theta && *theta != here) throw CorruptData(members.what() + " has two values of rope_theta");
    theta = here;
  }
  members.require(members.positive({"partial_rotary_factor"}, 1) == 1, "partial_rotary_factor");
  return theta.value_or(10000);
}

HuggingFaceConfig parse_llama(const Members& members) {
  HuggingFaceConfig config{.family = "llama"};
  config.layers = members.size({"num_hidden_layers"}, 32, kMaxLayers);
  config.width = members.size({"hidden_size"}, 4096);
  config.heads = members.size({"num_attention_heads"}, 32);
  config.kv_heads = members.size({"num_key_value_heads"}, config.heads);
  config.ffn_width = members.size({"intermediate_size"}, 11008);
  config.vocab_size = members.size({"vocab_size"}, 32000);
  config.sequence_length = members.size({"max_position_embeddings"}, 2048);
  config.tied_head = members.flag({"tie_word_embeddings"}, false);
  config.norm_epsilon = members.positive({"rms_norm_eps"}, 1e-6);
  config.rope_theta = parse_rope(members);
  members.require(members.text({"hidden_act"}, "silu") == "silu", "hidden_act");
  members.require(!members.flag({"attention_bias"}, false), "attention_bias");
  members.require(!members.flag({"mlp_bias"}, false), "mlp_bias");
  const int64_t head_dim = config.width / config.heads;
  members.require(members.size({"head_dim"}, head_dim) == head_dim, "head_dim");
  return config;
}

std::string places(const std::string& index, const std::string& tensor, const std::string& file) {
  return index + " places '" + tensor + "' in " + file;
}

}  // namespace

HuggingFaceConfig parse_hugging_face_config(const std::string& text, const std::string& path) {
  const std::string what = "'" + path + "'";
  if (text.size() > kMaxHuggingFaceConfigBytes) throw CorruptData(what + " is too long for a config.json");
  const json parsed = strict_parse(text, path);
  if (!parsed.is_object()) throw CorruptData(what + " is no JSON object");
  const Members members(parsed, what);
  const bool is_gpt2 = family_of(members) == "gpt2";
  members.require(members.find({"quantization_config"}) == nullptr, "quantization_config");
  HuggingFaceConfig config = is_gpt2 ? parse_gpt2(members) : parse_llama(members);
  if (config.width % config.heads != 0 || config.heads % config.kv_heads != 0)
    throw CorruptData(what + " has " + std::to_string(config.width) + " channels, " + std::to_string(config.heads) +
                      " heads, " + std::to_string(config.kv_heads) + " key-value heads, which do not divide");
  return config;
}

std::map<std::string, std::string> parse_hugging_face_index(const std::string& text, const std::string& path) {
  const std::string what = "'" + path + "'";
  if (text.size() > kMaxHuggingFaceIndexBytes) throw CorruptData(what + " is too long for an index");
  const json parsed = strict_parse(text, path);
  const json& files = member_of(parsed, "weight_map", what);
  if (!files.is_object() || files.empty() || files.size() > kMaxTensors)
    throw CorruptData(what + " has no weight_map of 1 to " + std::to_string(kMaxTensors) + " tensors");
  std::map<std::string, std::string> file_of;
  for (const auto& [name, file] : files.items()) {
    if (!is_tensor_name(name)) throw CorruptData(what + " has a tensor without a lawful name");
    if (!file.is_string() || !is_file_name(file.get_ref<const std::string&>()))
      throw CorruptData(places(what, name, file.dump().substr(0, 300)) + ", which could lie elsewhere");
    file_of.emplace(name, file.get<std::string>());
  }
  return file_of;
}

}  // namespace lockstep::format
