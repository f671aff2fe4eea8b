#include "hugging_face_folder.h"

#include <cerrno>
#include <set>

#include <lockstep/base/error.h>

namespace lockstep::format {
namespace {

constexpr const char* kConfigName = "config.json";
constexpr const char* kWeightsName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";

// Their download cache is made of links, which files that somebody sent must not lead us along.
template <typename Work>
auto refusing_links(const Work& work) {
  try {
    return work();
  } catch (const IoError& error) {
    if (error.error_number() != EINVAL && error.error_number() != ELOOP) throw;
    throw ConfigError(std::string(error.what()) +
                      ". Mend: if it is a link, as in a download cache, import a copy made with cp -rL");
  }
}

std::string missing(const std::string& tensor, const std::string& file) {
  return "'" + file + "' lacks tensor '" + tensor + "', which the index places there";
}

}  // namespace

HuggingFaceFolder::HuggingFaceFolder(Fs& fs, std::string directory) : fs_(fs), directory_(std::move(directory)) {
  const std::string path = path_of(kConfigName);
  if (!fs_.exists(path)) {
    throw ConfigError("'" + directory_ + "' has no " + kConfigName +
                      ". Mend: name a folder that save_pretrained wrote");
  }
  const std::string text = refusing_links([&] { return read_text(fs_, path, kMaxHuggingFaceConfigBytes); });
  config_ = parse_hugging_face_config(text, path);
  if (fs_.exists(path_of(kWeightsName))) {  // before an index, as transformers looks
    add_file(kWeightsName);
  } else if (fs_.exists(path_of(kIndexName))) {
    add_shards();
  } else {
    throw ConfigError("'" + directory_ + "' has neither " + kWeightsName + " nor " + kIndexName +
                      ". Mend: save the model with safetensors (save_pretrained does)");
  }
}

void HuggingFaceFolder::add_shards() {
  const std::string path = path_of(kIndexName);
  const std::string text = refusing_links([&] { return read_text(fs_, path, kMaxHuggingFaceIndexBytes); });
  const auto file_of = parse_hugging_face_index(text, path);
  std::set<std::string> files;
  for (const auto& [name, file] : file_of) files.insert(file);
  for (const std::string& file : files) add_file(file, &file_of);
  for (const auto& [name, file] : file_of) {
    if (!tensors_.contains(name)) throw CorruptData(missing(name, path_of(file)));
  }
}

void HuggingFaceFolder::add_file(const std::string& name, const std::map<std::string, std::string>* file_of) {
  const std::string path = path_of(name);
  if (!fs_.exists(path)) throw CorruptData("'" + path + "' is missing");
  const auto file = refusing_links([&] { return fs_.open_read(path); });
  TensorHeader header = read_header(*file, path);
  for (TensorEntry& entry : header.tensors) {
    if (file_of != nullptr) {
      const auto listed = file_of->find(entry.name);
      if (listed == file_of->end() || listed->second != name)
        throw CorruptData("'" + path + "' has '" + entry.name + "', which the index places elsewhere or not at all");
    }
    const std::string key = entry.name;
    tensors_.emplace(key, Tensor{name, header.data_start + entry.begin, std::move(entry)});
  }
}

std::string HuggingFaceFolder::what(const std::string& name) const {
  return "tensor '" + name + "' in '" + path_of(tensors_.at(name).file) + "'";
}

void HuggingFaceFolder::read(const Tensor& tensor, uint64_t offset, std::span<std::byte> target) {
  if (open_name_ != tensor.file) {
    open_ = fs_.open_read(path_of(tensor.file));
    open_name_ = tensor.file;
  }
  open_->read_at(tensor.begin + offset, target);
}

}  // namespace lockstep::format
