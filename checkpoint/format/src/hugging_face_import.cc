// A Hugging Face folder into a checkpoint, tensor by tensor.
#include <algorithm>
#include <cstring>
#include <set>
#include <sstream>

#include <lockstep/base/error.h>
#include <lockstep/format/hugging_face.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>
#include <lockstep/format/writer.h>

#include "float_formats.h"
#include "hugging_face_folder.h"
#include "hugging_face_task.h"
#include "new_folder.h"

namespace lockstep::format {
namespace {

/// What stands before names in a folder of the whole model; one of the base model alone has nothing.
std::string prefix_of(const HuggingFaceFolder& weights) {
  const bool is_gpt2 = weights.config().family == "gpt2";
  const std::string prefix = is_gpt2 ? "transformer." : "model.";
  const std::string embedding = is_gpt2 ? "wte.weight" : "embed_tokens.weight";
  return weights.tensors().contains(prefix + embedding) ? prefix : "";
}

/// Masks and frequencies that old versions stored: constants, which models compute.
bool is_constant(const std::string& family, const std::string& name) {
  return family == "gpt2" ? name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
                          : name.ends_with(".rotary_emb.inv_freq");
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

class Importer {
 public:
  Importer(HuggingFaceFolder& weights, const ProgressCallback& progress)
      : weights_(weights),
        prefix_(prefix_of(weights)),
        parts_(hugging_face_parts(weights.config())),
        progress_(progress) {
    check();
  }

  void write(Fs& fs, const std::string& path) {
    std::vector<BoxToWrite> boxes;
    for (const HuggingFacePart& part : parts_) {
      boxes.push_back({part.name, "F32", Box::whole(part.shape), {}});
      total_ += bytes_of(part);
    }
    ShardWriter writer(fs, path, boxes);
    for (const HuggingFacePart& part : parts_) {
      if (part.transposed) {
        write_transposed(part, writer);
      } else {
        write_as_it_is(part, writer);
      }
    }
    writer.finish();
  }

  std::map<std::string, StoredTensor> stored() const {
    std::map<std::string, StoredTensor> tensors;
    for (const HuggingFacePart& part : parts_) tensors[part.name] = {"F32", part.shape, {{Box::whole(part.shape), 0}}};
    return tensors;
  }
  std::string dtype() const { return source_of(parts_.front()).entry.dtype; }

 private:
  std::string their_name(const HuggingFacePart& part) const {
    return part.theirs == kHeadName ? part.theirs : prefix_ + part.theirs;
  }
  const HuggingFaceFolder::Tensor& source_of(const HuggingFacePart& part) const {
    return weights_.tensors().at(their_name(part));
  }
  static uint64_t bytes_of(const HuggingFacePart& part) {
    return static_cast<uint64_t>(Box::whole(part.shape).numel()) * sizeof(float);
  }

  // Every tensor that the model needs is there in the shape that the config says, and nothing else is: a tensor left
  // out would be a model that is silently another one.
  void check() {
    std::set<std::string> used;
    for (const HuggingFacePart& part : parts_) {
      const std::string name = their_name(part);
      const auto found = weights_.tensors().find(name);
      if (found == weights_.tensors().end())
        throw CorruptData("tensor '" + name + "', which its config.json asks for, is not in the folder");
      const TensorEntry& entry = found->second.entry;
      if (entry.shape != part.their_shape)
        throw CorruptData(weights_.what(name) + " has the shape " + shape_text(entry.shape) +
                          ", its config.json says " + shape_text(part.their_shape));
      if (!is_float_format(entry.dtype))
        throw ConfigError(weights_.what(name) + " is " + entry.dtype + "; F32, F16 and BF16 can be imported");
      used.insert(name);
    }
    if (weights_.config().tied_head && weights_.tensors().contains(kHeadName)) {
      check_tied();
      used.insert(kHeadName);
    }
    for (const auto& [name, tensor] : weights_.tensors()) {
      if (!used.contains(name) && !is_constant(weights_.config().family, name))
        throw ConfigError(weights_.what(name) + " has no place in a " + weights_.config().family +
                          " model of examples/gpt");
    }
  }

  // A head that is stored though it is tied is the embedding once more.
  void check_tied() {
    const std::string embedding_name = their_name(parts_.front());
    const HuggingFaceFolder::Tensor &head = weights_.tensors().at(kHeadName),
                                    &embedding = weights_.tensors().at(embedding_name);
    const std::string what = weights_.what(kHeadName) + " differs from the embedding that config.json ties it to";
    if (head.entry.shape != embedding.entry.shape || head.entry.dtype != embedding.entry.dtype) throw ConfigError(what);
    const uint64_t bytes = head.entry.end - head.entry.begin;
    std::vector<std::byte> a(std::min(kChunkBytes, bytes)), b(a.size());
    for (uint64_t offset = 0; offset < bytes; offset += kChunkBytes) {
      const uint64_t n = std::min(kChunkBytes, bytes - offset);
      weights_.read(head, offset, std::span(a).first(n));
      weights_.read(embedding, offset, std::span(b).first(n));
      if (std::memcmp(a.data(), b.data(), n) != 0) throw ConfigError(what);
    }
  }

  // `count` elements from `first` on, as f32.
  std::span<const float> read_floats(const HuggingFaceFolder::Tensor& source, int64_t first, int64_t count) {
    const auto item = static_cast<uint64_t>(item_bytes(source.entry.dtype));
    raw_.resize(static_cast<uint64_t>(count) * item);
    floats_.resize(static_cast<size_t>(count));
    weights_.read(source, static_cast<uint64_t>(first) * item, raw_);
    widen(source.entry.dtype, raw_, floats_);
    return floats_;
  }

  void append(std::span<const float> values, ShardWriter& writer) {
    writer.append(std::as_bytes(values));
    done_ += values.size_bytes();
    if (progress_) progress_(done_, total_);
  }

  void write_as_it_is(const HuggingFacePart& part, ShardWriter& writer) {
    const int64_t numel = Box::whole(part.shape).numel();
    for (int64_t first = 0; first < numel; first += kStepElements)
      append(read_floats(source_of(part), part.begin + first, std::min(kStepElements, numel - first)), writer);
  }

  void write_transposed(const HuggingFacePart& part, ShardWriter& writer) {
    const int64_t out = part.shape[0], in = part.shape[1], total = part.their_shape[1];
    std::vector<float> target(static_cast<size_t>(out * in));
    const int64_t step = std::max<int64_t>(1, kStepElements / total);
    for (int64_t row = 0; row < in; row += step) {
      const int64_t rows = std::min(step, in - row);
      const float* theirs = read_floats(source_of(part), row * total, rows * total).data() + part.begin;
      transpose(theirs, total, rows, out, target.data() + row, in);
    }
    append(target, writer);
  }

  HuggingFaceFolder& weights_;
  std::string prefix_;
  std::vector<HuggingFacePart> parts_;
  const ProgressCallback& progress_;
  uint64_t done_ = 0, total_ = 0;
  std::vector<std::byte> raw_;
  std::vector<float> floats_;
};

std::string flags_of(const HuggingFaceConfig& c) {
  std::ostringstream text;
  text << "# Flags of examples/gpt for the weights beside this file: gpt --flagfile=THIS --init_from=ITS_FOLDER ...\n";
  if (c.family == "llama") {
    text << "# --sequence_length is the most that the model was made for; a later flag may lower it.\n";
  } else {
    text << "# --sequence_length is the number of learned positions, all of which the model has.\n";
  }
  text << "--model=" << c.family << "\n--layers=" << c.layers << "\n--width=" << c.width << "\n--heads=" << c.heads
       << "\n--kv_heads=" << c.kv_heads << "\n--ffn_width=" << c.ffn_width << "\n--vocab_size=" << c.vocab_size
       << "\n--sequence_length=" << c.sequence_length << "\n--tied_head=" << (c.tied_head ? "true" : "false")
       << "\n--norm_epsilon=" << number_text(c.norm_epsilon) << "\n";
  if (c.family == "llama") text << "--rope_theta=" << number_text(c.rope_theta) << "\n";
  return text.str();
}

}  // namespace

void import_hugging_face(Fs& fs, const std::string& directory, const std::string& out,
                         const ProgressCallback& progress) {
  HuggingFaceFolder weights(fs, directory);
  Importer importer(weights, progress);
  NewFolder folder(fs, out);
  const std::string shard = shard_name(0, 1);
  importer.write(fs, folder.add(shard));
  write_durable(fs, folder.add("model.flags"), flags_of(weights.config()));
  Manifest manifest{.config_json = task_of(weights.config()), .record_json = import_record(importer.dtype())};
  manifest.files.push_back(describe_shard(fs, out, shard));
  manifest.tensors = importer.stored();
  folder.keep(kManifestName, encode_manifest(manifest));
}

}  // namespace lockstep::format
