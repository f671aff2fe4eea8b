// A checkpoint into a Hugging Face folder, tensor by tensor.
#include <algorithm>
#include <array>
#include <cstdio>
#include <set>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/format/hugging_face.h>
#include <lockstep/format/tensor_file.h>

#include "float_formats.h"
#include "hugging_face_task.h"
#include "new_folder.h"

namespace lockstep::format {
namespace {

using Json = nlohmann::ordered_json;

// Elements read of a tensor at a time: chunks at the edges are read and checked twice, so there should be few edges.
constexpr int64_t kReadElements = 4 << 20;

// One tensor of theirs and the parts of it, ours, in order.
struct TheirTensor {
  std::string name;
  std::vector<HuggingFacePart> parts;
};

std::vector<TheirTensor> their_tensors(const HuggingFaceConfig& config) {
  const std::string prefix = config.family == "gpt2" ? "transformer." : "model.";
  std::vector<TheirTensor> tensors;
  for (HuggingFacePart& part : hugging_face_parts(config)) {
    const std::string name = part.theirs == kHeadName ? part.theirs : prefix + part.theirs;
    if (tensors.empty() || tensors.back().name != name) tensors.push_back({name, {}});
    tensors.back().parts.push_back(std::move(part));
  }
  return tensors;
}

/// A file of theirs and the tensors in it.
struct TheirFile {
  std::string name;
  std::vector<TensorEntry> entries;
  std::vector<const TheirTensor*> tensors;
  uint64_t bytes = 0;
};

std::vector<TheirFile> cut_into_files(const std::vector<TheirTensor>& tensors, const HuggingFaceExport& options) {
  std::vector<TheirFile> files(1);
  for (const TheirTensor& tensor : tensors) {
    TensorEntry entry{.name = tensor.name, .dtype = options.dtype, .shape = tensor.parts[0].their_shape};
    const auto bytes = static_cast<uint64_t>(checked_numel(entry.shape, tensor.name) * item_bytes(entry.dtype));
    if (files.back().bytes > 0 && files.back().bytes + bytes > options.max_file_bytes) files.emplace_back();
    files.back().entries.push_back(std::move(entry));
    files.back().tensors.push_back(&tensor);
    files.back().bytes += bytes;
  }
  for (size_t i = 0; i < files.size(); ++i) {
    std::array<char, 64> name{};
    std::snprintf(name.data(), name.size(), "model-%05zu-of-%05zu.safetensors", i + 1, files.size());
    files[i].name = files.size() == 1 ? "model.safetensors" : name.data();
  }
  return files;
}

std::string index_text(const std::vector<TheirFile>& files) {
  Json map = Json::object();
  uint64_t total = 0;
  for (const TheirFile& file : files) {
    total += file.bytes;
    for (const TheirTensor* tensor : file.tensors) map[tensor->name] = file.name;
  }
  return Json({{"metadata", {{"total_size", total}}}, {"weight_map", map}}).dump(2) + "\n";
}

class Exporter {
 public:
  Exporter(const Reader& reader, const HuggingFaceExport& options, const ProgressCallback& progress)
      : reader_(reader), options_(options), progress_(progress) {
    floats_.reserve(kReadElements);  // once: growing holds the old beside the new
  }

  /// @throws ConfigError unless the checkpoint's weights are exactly these.
  void check(const std::vector<TheirTensor>& tensors) {
    std::set<std::string> known;
    for (const TheirTensor& tensor : tensors) {
      for (const HuggingFacePart& part : tensor.parts) {
        const auto found = reader_.manifest().tensors.find(part.name);
        if (found == reader_.manifest().tensors.end() || found->second.shape != part.shape ||
            found->second.dtype != "F32")
          throw ConfigError("'" + reader_.path() + "' has no tensor '" + part.name +
                            "' in F32 and of the shape that its configuration says");
        known.insert(part.name);
        total_ += static_cast<uint64_t>(Box::whole(part.shape).numel()) * sizeof(float);
      }
    }
    for (const auto& [key, stored] : reader_.manifest().tensors) {
      if (is_weights_section(section_of(key)) && !known.contains(key))
        throw ConfigError("'" + reader_.path() + "' has a tensor '" + key + "', for which their folders have no place");
    }
  }

  void write(Fs& fs, const std::string& path, TheirFile& file) {
    const std::string header = encode_header(file.entries, {{"format", "pt"}});
    file_ = fs.create_exclusive(path);
    file_->allocate(header.size() + file.bytes);
    file_->write_at(0, std::as_bytes(std::span(header.data(), header.size())));
    position_ = header.size();
    for (const TheirTensor* tensor : file.tensors) {
      tensor_ = &tensor->name;
      if (tensor->parts[0].transposed) {
        write_transposed(*tensor);
      } else {
        for (const HuggingFacePart& part : tensor->parts) read_by_rows(part, [&](int64_t, auto rows) { append(rows); });
      }
    }
    file_->sync();
    file_->close();
  }

 private:
  // Calls `take(first row, the rows' values)` for stretches of a tensor of ours, in order.
  template <typename Take>
  void read_by_rows(const HuggingFacePart& part, const Take& take) {
    Box box = Box::whole(part.shape);
    const int64_t rows = part.shape[0], row_elements = part.shape.size() > 1 ? part.shape[1] : 1;
    const int64_t step = std::max<int64_t>(1, kReadElements / row_elements);
    for (int64_t row = 0; row < rows; row += step) {
      box.offsets[0] = row;
      box.sizes[0] = std::min(step, rows - row);
      floats_.resize(static_cast<size_t>(box.numel()));
      reader_.read(part.name, box, std::as_writable_bytes(std::span(floats_)));
      done_ += floats_.size() * sizeof(float);
      if (progress_) progress_(done_, total_);
      take(row, std::span<const float>(floats_));
    }
  }

  void write_transposed(const TheirTensor& tensor) {
    const int64_t in = tensor.parts[0].their_shape[0], total = tensor.parts[0].their_shape[1];
    std::vector<float> target(static_cast<size_t>(in * total));
    for (const HuggingFacePart& part : tensor.parts) {
      read_by_rows(part, [&](int64_t row, std::span<const float> rows) {
        transpose(rows.data(), in, static_cast<int64_t>(rows.size()) / in, in, target.data() + part.begin + row, total);
      });
    }
    append(target);
  }

  void append(std::span<const float> values) {
    const auto item = static_cast<uint64_t>(item_bytes(options_.dtype));
    for (size_t first = 0; first < values.size(); first += kStepElements) {
      const auto step = values.subspan(first, std::min<size_t>(kStepElements, values.size() - first));
      bytes_.resize(step.size() * item);
      if (!narrow(options_.dtype, step, bytes_))
        throw ConfigError("tensor '" + *tensor_ + "' has values too large for " + options_.dtype +
                          ". Mend: --dtype f32");
      file_->write_at(position_, bytes_);
      position_ += bytes_.size();
    }
  }

  const Reader& reader_;
  const HuggingFaceExport& options_;
  const ProgressCallback& progress_;
  uint64_t done_ = 0, total_ = 0, position_ = 0;
  const std::string* tensor_ = nullptr;  // being written
  std::unique_ptr<File> file_;
  std::vector<float> floats_;
  std::vector<std::byte> bytes_;
};

}  // namespace

void export_hugging_face(Fs& fs, const std::string& checkpoint, const std::string& out,
                         const HuggingFaceExport& options, const ProgressCallback& progress) {
  LOCKSTEP_CHECK(is_float_format(options.dtype)) << "weights cannot be exported as " << options.dtype;
  const Reader reader(fs, checkpoint, options.trust);
  const HuggingFaceConfig config = config_of_task(reader.manifest(), "'" + checkpoint + "'");
  const auto tensors = their_tensors(config);
  Exporter exporter(reader, options, progress);
  exporter.check(tensors);
  std::vector<TheirFile> files = cut_into_files(tensors, options);
  NewFolder folder(fs, out);
  for (TheirFile& file : files) exporter.write(fs, folder.add(file.name), file);
  if (files.size() > 1) write_durable(fs, folder.add("model.safetensors.index.json"), index_text(files));
  folder.keep("config.json", hugging_face_config_text(config, options.dtype));
}

}  // namespace lockstep::format
