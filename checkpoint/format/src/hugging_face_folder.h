#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>

#include <lockstep/base/fs.h>
#include <lockstep/format/hugging_face.h>
#include <lockstep/format/tensor_file.h>

namespace lockstep::format {

/// A Hugging Face folder opened for reading: its config and its tensors, by name. All headers are parsed on opening;
/// one file is open at a time, for a large model has hundreds.
class HuggingFaceFolder {
 public:
  /// @throws ConfigError, CorruptData, IoError as import_hugging_face() says.
  HuggingFaceFolder(Fs& fs, std::string directory);

  struct Tensor {
    std::string file;
    uint64_t begin = 0;  ///< of its data in the file
    TensorEntry entry;
  };
  const HuggingFaceConfig& config() const { return config_; }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  /// A tensor and where it is, for messages.
  std::string what(const std::string& name) const;

  /// Fills `target` from `offset` bytes into a tensor's data.
  void read(const Tensor& tensor, uint64_t offset, std::span<std::byte> target);

 private:
  void add_shards();
  void add_file(const std::string& name, const std::map<std::string, std::string>* file_of = nullptr);
  std::string path_of(const std::string& name) const { return directory_ + "/" + name; }

  Fs& fs_;
  std::string directory_;
  HuggingFaceConfig config_;
  std::map<std::string, Tensor> tensors_;
  std::unique_ptr<File> open_;
  std::string open_name_;
};

}  // namespace lockstep::format
