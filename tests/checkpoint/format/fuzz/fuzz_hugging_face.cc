// Any text as config.json and as model.safetensors.index.json of a Hugging Face folder.
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/format/hugging_face.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

#include "fuzz_target.h"

namespace lockstep::format {
namespace {

constexpr int64_t kMaxSize = INT32_MAX, kFewLayers = 50;

void try_config(const std::string& text) {
  HuggingFaceConfig config;
  try {
    config = parse_hugging_face_config(text, "config.json");
  } catch (const CorruptData&) {
    return;
  } catch (const ConfigError&) {  // a model that we do not have
    return;
  }
  for (const int64_t size : {config.layers, config.width, config.heads, config.kv_heads, config.ffn_width,
                             config.vocab_size, config.sequence_length})
    FUZZ_CHECK(size > 0 && size <= kMaxSize);
  FUZZ_CHECK(config.width % config.heads == 0 && config.heads % config.kv_heads == 0);
  FUZZ_CHECK(config.norm_epsilon > 0 && config.rope_theta > 0);
  if (config.layers > kFewLayers) return;
  for (const HuggingFacePart& part : hugging_face_parts(config)) {
    FUZZ_CHECK(is_tensor_name(part.name) && is_tensor_name(part.theirs));
    FUZZ_CHECK(part.shape.size() == part.their_shape.size() && !part.shape.empty());
  }
}

void try_index(const std::string& text) {
  std::map<std::string, std::string> file_of;
  try {
    file_of = parse_hugging_face_index(text, "index.json");
  } catch (const CorruptData&) {
    return;
  }
  FUZZ_CHECK(!file_of.empty() && file_of.size() <= kMaxTensors);
  for (const auto& [name, file] : file_of) FUZZ_CHECK(is_tensor_name(name) && is_file_name(file));
  const std::string again = nlohmann::json{{"weight_map", file_of}}.dump();
  FUZZ_CHECK(parse_hugging_face_index(again, "index.json") == file_of);
}

}  // namespace
}  // namespace lockstep::format

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  lockstep::format::try_config(text);
  lockstep::format::try_index(text);
  return 0;
}
