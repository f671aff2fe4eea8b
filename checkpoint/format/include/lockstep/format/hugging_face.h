#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>
#include <lockstep/format/reader.h>

namespace lockstep::format {

/// A GPT-2 or Llama model as a Hugging Face config.json describes it, in the words of examples/gpt.
struct HuggingFaceConfig {
  std::string family;  ///< "gpt2" or "llama"
  int64_t layers = 0, width = 0, heads = 0, kv_heads = 0, ffn_width = 0, vocab_size = 0;
  int64_t sequence_length = 0;  ///< the most positions
  bool tied_head = true;
  double norm_epsilon = 1e-5, rope_theta = 10000;  ///< as where a run's manifest does not say
};

inline constexpr uint64_t kMaxHuggingFaceConfigBytes = 1 << 20;
inline constexpr uint64_t kMaxHuggingFaceIndexBytes = 64 << 20;

/// Reads config.json, of transformers 5 or older: each key under any of its spellings, an absent one by its
/// architecture's default.
/// @throws CorruptData no JSON, limits, two spellings that disagree. ConfigError another architecture, or a variant
/// that examples/gpt does not compute (biases in Llama, scaled RoPE, another activation, ...), by name.
HuggingFaceConfig parse_hugging_face_config(const std::string& text, const std::string& path);

/// Reads model.safetensors.index.json: file by tensor. @throws CorruptData no JSON, limits, a file name that could lie
/// elsewhere.
std::map<std::string, std::string> parse_hugging_face_index(const std::string& text, const std::string& path);

/// A tensor of ours as a part of one of theirs.
struct HuggingFacePart {
  std::string name;            ///< ours: "block0.query.weight"
  std::vector<int64_t> shape;  ///< ours
  std::string theirs;          ///< without the prefix that the whole model's folder has: "h.0.attn.c_attn.weight"
  std::vector<int64_t> their_shape;
  bool transposed = false;  ///< theirs is [in, out] (GPT-2's Conv1D), ours [out, in]
  int64_t begin = 0;        ///< where ours starts in theirs, along out, or in a bias
};

/// Every tensor of the model. Parts of one of theirs follow each other and fill it.
std::vector<HuggingFacePart> hugging_face_parts(const HuggingFaceConfig& config);

/// Makes a checkpoint (weights only, F32, step 0) of a Hugging Face folder: config.json with model.safetensors, or with
/// the shards of model.safetensors.index.json, in F32, F16 or BF16. Beside its MANIFEST lies model.flags, the flags of
/// examples/gpt for it. Durable when it returns; after an exception nothing is left.
///
/// Memory: the largest matrix that GPT-2 stores transposed, in f32, and some MiB; weights that are not transposed pass
/// through in pieces. @param out a folder that is not there yet.
/// @throws ConfigError not such a folder, a model of another kind, `out` is there; CorruptData; IoError.
void import_hugging_face(Fs& fs, const std::string& directory, const std::string& out,
                         const ProgressCallback& progress = {});

struct HuggingFaceExport {
  std::string dtype = "F32";                ///< F32, BF16 or F16, rounded to nearest, ties to even
  uint64_t max_file_bytes = 5'000'000'000;  ///< of data; the reference's own default. A larger tensor has a file alone
  Trust trust = Trust::kOwn;                ///< whose checkpoint it may be
};

/// The way back, of a checkpoint of examples/gpt saved in any layout, each byte verified. config.json comes last, in
/// the spellings of transformers 5 and of older ones. Memory as above.
/// @throws ConfigError not such a checkpoint, `out` is there, a value too large for the dtype; CorruptData; IoError.
void export_hugging_face(Fs& fs, const std::string& checkpoint, const std::string& out,
                         const HuggingFaceExport& options = {}, const ProgressCallback& progress = {});

}  // namespace lockstep::format
