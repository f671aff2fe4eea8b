#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>

#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/format/hugging_face.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>
#include <lockstep/format/tensor_file.h>

#include "../temp_dir.h"
#include "float_formats.h"

namespace lockstep::format {
namespace {

using testing::AllOf;
using testing::HasSubstr;

HuggingFaceConfig config_of(const std::string& text) { return parse_hugging_face_config(text, "config.json"); }

template <typename Expected, typename Work>
std::string message_of(const Work& work) {
  try {
    work();
  } catch (const Expected& error) {
    return error.what();
  }
  return "no such exception";
}

std::string corrupt(const std::string& text) {
  return message_of<CorruptData>([&] { config_of(text); });
}
std::string refused(const std::string& text) {
  return message_of<ConfigError>([&] { config_of(text); });
}

TEST(HuggingFaceConfigTest, OldAndNewSpellingsOfLlamaMeanTheSame) {
  const std::string sizes = R"({"model_type": "llama", "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 99,
    "max_position_embeddings": 24, "rms_norm_eps": 3e-6, )";
  for (const std::string rope :
       {R"("torch_dtype": "float32", "rope_theta": 50000, "rope_scaling": null})",
        R"("rope_theta": 50000.0, "rope_scaling": {"type": "default"}})",
        R"("dtype": "float32", "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}})",
        R"("rope_theta": 50000.0, "rope_parameters": {"rope_theta": 50000, "rope_type": "default"}})"}) {
    const HuggingFaceConfig config = config_of(sizes + rope);
    EXPECT_EQ(config.family, "llama");
    EXPECT_EQ(config.rope_theta, 50000) << rope;
    EXPECT_EQ(config.norm_epsilon, 3e-6);
    EXPECT_EQ(std::vector({config.layers, config.width, config.heads, config.kv_heads, config.ffn_width,
                           config.vocab_size, config.sequence_length}),
              (std::vector<int64_t>{3, 48, 6, 2, 80, 99, 24}));
  }
}

TEST(HuggingFaceConfigTest, OldAndNewSpellingsOfGpt2MeanTheSame) {
  for (
      const std::string text :
      {R"({"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 24, "n_ctx": 24, "n_inner": null})",
       R"({"architectures": ["GPT2LMHeadModel"], "n_embd": 48, "n_layer": 3, "n_head": 4, "n_ctx": 24})",
       R"({"model_type": "gpt2", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 24, "activation_function": "gelu_pytorch_tanh"})"}) {
    const HuggingFaceConfig config = config_of(text);
    EXPECT_EQ(std::vector({config.layers, config.width, config.heads, config.kv_heads, config.ffn_width,
                           config.vocab_size, config.sequence_length}),
              (std::vector<int64_t>{3, 48, 4, 4, 192, 50257, 24}))
        << text;
    EXPECT_EQ(config.norm_epsilon, 1e-5);
  }
}

TEST(HuggingFaceConfigTest, WhatIsAbsentIsTheArchitecturesDefault) {
  EXPECT_TRUE(config_of(R"({"model_type": "gpt2"})").tied_head);
  const HuggingFaceConfig llama = config_of(R"({"model_type": "llama"})");
  EXPECT_FALSE(llama.tied_head);
  EXPECT_EQ(llama.kv_heads, 32);
  EXPECT_EQ(llama.norm_epsilon, 1e-6);
  EXPECT_EQ(llama.rope_theta, 10000);
  EXPECT_EQ(config_of(R"({"model_type": "llama", "num_attention_heads": 8})").kv_heads, 8);
}

TEST(HuggingFaceConfigTest, VariantsThatWouldComputeOtherwiseAreRefusedByName) {
  EXPECT_THAT(refused(R"({"model_type": "bert"})"), HasSubstr("'bert'"));
  EXPECT_THAT(refused("{}"), HasSubstr("gpt2 and llama"));
  for (const std::string member :
       {R"("attention_bias": true)", R"("mlp_bias": true)", R"("hidden_act": "gelu")", R"("head_dim": 64)",
        R"("partial_rotary_factor": 0.5)", R"("quantization_config": {})", R"("rope_scaling": {"rope_type": "llama3"})",
        R"("rope_parameters": {"rope_type": "yarn"})", R"("rope_parameters": {"partial_rotary_factor": 0.5})"}) {
    const std::string name = member.substr(1, member.find('"', 1) - 1);
    EXPECT_THAT(refused(R"({"model_type": "llama", )" + member + "}"), HasSubstr(name));
  }
  for (const std::string member : {R"("scale_attn_weights": false)", R"("scale_attn_by_inverse_layer_idx": true)",
                                   R"("add_cross_attention": true)"}) {
    const std::string name = member.substr(1, member.find('"', 1) - 1);
    EXPECT_THAT(refused(R"({"model_type": "gpt2", )" + member + "}"), HasSubstr(name));
  }
  EXPECT_THAT(refused(R"({"model_type": "gpt2", "activation_function": "gelu"})"), HasSubstr("'gelu'"));
}

TEST(HuggingFaceConfigTest, NonsenseIsCorrupt) {
  EXPECT_THAT(corrupt("{"), HasSubstr("config.json"));
  EXPECT_THAT(corrupt("[]"), HasSubstr("no JSON object"));
  EXPECT_THAT(corrupt(R"({"model_type": 7})"), HasSubstr("model_type"));
  EXPECT_THAT(corrupt(R"({"model_type": "gpt2", "model_type": "gpt2"})"), HasSubstr("twice"));
  EXPECT_THAT(corrupt(R"({"model_type": "gpt2", "n_embd": 48, "hidden_size": 64})"),
              AllOf(HasSubstr("48"), HasSubstr("64")));
  EXPECT_THAT(corrupt(R"({"model_type": "llama", "rope_theta": 1, "rope_parameters": {"rope_theta": 2}})"),
              HasSubstr("two values"));
  EXPECT_THAT(corrupt(R"({"model_type": "gpt2", "n_embd": 50})"), HasSubstr("do not divide"));
  EXPECT_THAT(corrupt(std::string(kMaxHuggingFaceConfigBytes + 1, ' ')), HasSubstr("too long"));
  for (const std::string value :
       {"0", "-1", "1.5", "1e300", "18446744073709551615", "2147483648", "\"48\"", "[]", "true"})
    EXPECT_THAT(corrupt(R"({"model_type": "gpt2", "n_embd": )" + value + "}"), HasSubstr("n_embd")) << value;
  EXPECT_THAT(corrupt(R"({"model_type": "gpt2", "n_layer": 10001})"), HasSubstr("n_layer"));
  for (const std::string value : {"0", "-1e-5", "\"1e-5\"", "{}"})
    EXPECT_THAT(corrupt(R"({"model_type": "gpt2", "layer_norm_epsilon": )" + value + "}"), HasSubstr("positive"))
        << value;
  EXPECT_THAT(corrupt(R"({"model_type": "gpt2", "tie_word_embeddings": 1})"), HasSubstr("neither true nor false"));
  EXPECT_THAT(corrupt(R"({"model_type": "llama", "rope_scaling": 2})"), HasSubstr("rope_scaling"));
}

TEST(HuggingFaceIndexTest, FilesAreFoundByTensor) {
  const auto files = parse_hugging_face_index(
      R"({"metadata": {"total_size": 1e3}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "x"}})", "i");
  EXPECT_EQ(files, (std::map<std::string, std::string>{{"a", "model-00001-of-00002.safetensors"}, {"b", "x"}}));
}

TEST(HuggingFaceIndexTest, NamesThatCouldLieElsewhereAreCorrupt) {
  const auto corrupt_index = [](const std::string& text) {
    return message_of<CorruptData>([&] { parse_hugging_face_index(text, "index"); });
  };
  for (const std::string file : {"../x", "/x", "a/b", "", ".", "..", ".x", "a\\u0000b", "a b"})
    EXPECT_THAT(corrupt_index(R"({"weight_map": {"w": ")" + file + R"("}})"), HasSubstr("could lie elsewhere")) << file;
  EXPECT_THAT(corrupt_index(R"({"weight_map": {"w": 1}})"), HasSubstr("could lie elsewhere"));
  EXPECT_THAT(corrupt_index(R"({"weight_map": {"": "x"}})"), HasSubstr("lawful name"));
  EXPECT_THAT(corrupt_index(R"({"weight_map": {}})"), HasSubstr("weight_map"));
  EXPECT_THAT(corrupt_index(R"({"weight_map": []})"), HasSubstr("weight_map"));
  EXPECT_THAT(corrupt_index("{}"), HasSubstr("weight_map"));
  EXPECT_THAT(corrupt_index("7"), HasSubstr("weight_map"));
}

TEST(HuggingFacePartsTest, PartsFollowEachOtherAndFillTheirTensors) {
  for (const std::string family : {"gpt2", "llama"}) {
    HuggingFaceConfig config{.family = family, .layers = 2, .width = 12, .heads = 3, .kv_heads = 3, .ffn_width = 20};
    config.vocab_size = 7, config.sequence_length = 5, config.tied_head = false;
    std::set<std::string> ours, theirs;
    std::string open;
    int64_t filled = 0, total = 0;
    for (const HuggingFacePart& part : hugging_face_parts(config)) {
      EXPECT_TRUE(ours.insert(part.name).second) << part.name;
      if (part.theirs != open) {
        EXPECT_EQ(filled, total) << open;
        EXPECT_TRUE(theirs.insert(part.theirs).second) << part.theirs << " comes twice";
        open = part.theirs, filled = 0, total = Box::whole(part.their_shape).numel();
      }
      const int64_t rows = part.shape[0], out = part.transposed ? part.their_shape[1] : part.their_shape[0];
      EXPECT_EQ(part.begin, filled * out / total) << part.name;
      EXPECT_LE(part.begin + rows, out) << part.name;
      filled += Box::whole(part.shape).numel();
    }
    EXPECT_EQ(filled, total);
    EXPECT_EQ(ours.size(), family == "gpt2" ? 5U + 2 * 16 : 3U + 2 * 9);
  }
}

TEST(FloatFormatsTest, HalvesAreRoundedToNearestWithTiesToEven) {
  EXPECT_EQ(float_to_half(1.0F), 0x3c00);
  EXPECT_EQ(float_to_half(0x1.002p0F), 0x3c00);
  EXPECT_EQ(float_to_half(0x1.006p0F), 0x3c02);
  EXPECT_EQ(float_to_half(-65504.0F), 0xfbff);
  EXPECT_EQ(float_to_half(65519.99F), 0x7bff);
  EXPECT_EQ(float_to_half(65520.0F), 0x7c00);
  EXPECT_EQ(float_to_half(0x1p-24F), 1);
  EXPECT_EQ(float_to_half(0x1p-25F), 0);
  EXPECT_EQ(float_to_half(0x1.8p-24F), 2);
  EXPECT_EQ(float_to_half(0x1.ffcp-15F), 0x0400) << "carries into the normal numbers";
  EXPECT_EQ(float_to_bfloat16(0x1.01p0F), 0x3f80);
  EXPECT_EQ(float_to_bfloat16(0x1.03p0F), 0x3f82);
  std::vector<std::byte> bytes(4);
  EXPECT_TRUE(narrow("F16", std::vector<float>{65504, INFINITY}, bytes));
  EXPECT_FALSE(narrow("F16", std::vector<float>{65504, 7e4F}, bytes));
}

// A one-layer GPT-2 of 1, 2, 3, ... as a folder.
class HuggingFaceFolderTest : public testing::Test {
 protected:
  HuggingFaceFolderTest() {
    std::filesystem::create_directory(source());
    write("config.json",
          R"({"model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 3, "vocab_size": 5})");
    HuggingFaceConfig config{.family = "gpt2", .layers = 1, .width = 4, .heads = 2, .kv_heads = 2, .ffn_width = 16};
    config.vocab_size = 5, config.sequence_length = 3;
    std::vector<TensorEntry> entries;
    for (const HuggingFacePart& part : hugging_face_parts(config)) {
      if (entries.empty() || entries.back().name != part.theirs)
        entries.push_back({.name = part.theirs, .dtype = "F32", .shape = part.their_shape});
    }
    std::string file = encode_header(entries, {});
    std::vector<float> values(entries.back().end / sizeof(float));
    std::iota(values.begin(), values.end(), 1.0F);
    file.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    write("model.safetensors", file);
    for (const TensorEntry& entry : entries) starts_[entry.name] = static_cast<float>(entry.begin) / sizeof(float) + 1;
  }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(source() + "/" + name, std::ios::binary) << text;
  }
  std::string source() const { return folder_.path() + "/source"; }
  std::string out() const { return folder_.path() + "/out"; }

  TempDir folder_;
  std::map<std::string, float> starts_;  // first value of each tensor of theirs
};

TEST_F(HuggingFaceFolderTest, Conv1dIsTransposedAndCutIntoQueryKeyValue) {
  import_hugging_face(real_fs(), source(), out());
  const Reader reader(real_fs(), out());
  std::vector<float> key(16), bias(4);
  reader.read("block0.key.weight", Box::whole({4, 4}), std::as_writable_bytes(std::span(key)));
  reader.read("block0.key.bias", Box::whole({4}), std::as_writable_bytes(std::span(bias)));
  for (int64_t out = 0; out < 4; ++out) {
    for (int64_t in = 0; in < 4; ++in)
      EXPECT_EQ(key[out * 4 + in], starts_["h.0.attn.c_attn.weight"] + static_cast<float>(in * 12 + 4 + out));
    EXPECT_EQ(bias[out], starts_["h.0.attn.c_attn.bias"] + static_cast<float>(4 + out));
  }
  EXPECT_EQ(reader.manifest().step, 0);
  const std::string flags = read_text(real_fs(), out() + "/model.flags", 1 << 16);
  for (const char* flag : {"--model=gpt2", "--layers=1", "--width=4", "--heads=2", "--ffn_width=16", "--vocab_size=5",
                           "--sequence_length=3", "--tied_head=true", "--norm_epsilon=1e-05"})
    EXPECT_THAT(flags, HasSubstr(std::string(flag) + "\n"));
}

// Runs `work` on a file system whose k-th call fails, for every k; true for as long as there is such a call.
template <typename Work>
void with_each_call_failing(const std::string& out, const Work& work) {
  for (int64_t k = 0;; ++k) {
    ASSERT_LT(k, 1000);
    FaultFs fs(real_fs(), [&](const std::string&, const std::string&, int64_t call) {
      return call == k ? Fault{.error_number = ENOSPC} : Fault{};
    });
    try {
      work(fs);
      EXPECT_GT(k, 10);
      return;
    } catch (const IoError&) {
      ASSERT_FALSE(std::filesystem::exists(out)) << "call " << k << " failed: " << fs.log().back();
    }
  }
}

TEST_F(HuggingFaceFolderTest, WhateverCallFailsNothingIsLeft) {
  with_each_call_failing(out(), [&](Fs& fs) { import_hugging_face(fs, source(), out()); });
  const std::string back = folder_.path() + "/back";
  with_each_call_failing(back, [&](Fs& fs) { export_hugging_face(fs, out(), back, {.max_file_bytes = 100}); });
  EXPECT_TRUE(std::filesystem::exists(back + "/model.safetensors.index.json"));
}

TEST_F(HuggingFaceFolderTest, AnotherUsersCheckpointIsExportedOnlyWhereAPersonTrustsIt) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root gives files away";
  import_hugging_face(real_fs(), source(), out());
  ASSERT_EQ(::chown((out() + "/" + shard_name(0, 1)).c_str(), 65534, 65534), 0);
  const std::string back = folder_.path() + "/back";
  EXPECT_THROW(export_hugging_face(real_fs(), out(), back), ConfigError);
  EXPECT_FALSE(std::filesystem::exists(back));
  export_hugging_face(real_fs(), out(), back, {.trust = Trust::kAny});
  EXPECT_TRUE(std::filesystem::exists(back + "/config.json"));
}

TEST_F(HuggingFaceFolderTest, TheManifestComesAfterAllElseIsSynced) {
  FaultFs fs(real_fs(), [](const std::string&, const std::string&, int64_t) { return Fault{}; });
  import_hugging_face(fs, source(), out());
  std::vector<std::string> calls;
  for (const std::string& call : fs.log()) {
    if (call.starts_with("sync") || call.starts_with("rename"))
      calls.push_back(call.substr(0, call.find(' ', call.find(out()))));
  }
  const std::string shard = out() + "/" + shard_name(0, 1), manifest = out() + "/" + kManifestName;
  EXPECT_THAT(
      calls, testing::ElementsAre("sync_directory " + folder_.path(), "sync " + shard, "sync " + out() + "/model.flags",
                                  "sync_directory " + out(), "sync_directory " + out(), "sync " + manifest + ".tmp",
                                  "sync_directory " + out(), "rename " + manifest, "sync_directory " + out()));
}

}  // namespace
}  // namespace lockstep::format
