#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>
#include <lockstep/format/writer.h>

namespace lockstep::format {

/// A tensor whose byte i of the global row-major order is a known function of (key, i).
struct WrittenTensor {
  std::string key, dtype;
  std::vector<int64_t> shape;
  std::vector<Box> boxes;  ///< box i lies in file i
};

inline void cut(const WrittenTensor& tensor, const Box& box, std::span<std::byte> target, int salt = 0) {
  const int64_t item = item_bytes(tensor.dtype);
  for_each_run(box, Box::whole(tensor.shape), box, [&](int64_t from, int64_t to, int64_t count) {
    for (int64_t i = 0; i < count * item; ++i) {
      const int64_t byte = from * item + i;
      target[static_cast<size_t>(to * item + i)] = static_cast<std::byte>(byte * 37 + (byte >> 7) + salt);
    }
  });
}

/// The bytes of a file.
inline std::string slurp(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// A checkpoint folder on the real file system, one file for each box index.
inline void write_checkpoint(const std::string& directory, const std::vector<WrittenTensor>& tensors, int salt = 0,
                             bool with_sha256 = false) {
  size_t num_files = 0;
  for (const auto& tensor : tensors) num_files = std::max(num_files, tensor.boxes.size());
  Manifest manifest{.step = 1, .epoch = 1, .world_size = static_cast<int64_t>(num_files)};
  for (size_t file = 0; file < num_files; ++file) {
    std::vector<std::vector<std::byte>> memory;
    std::vector<BoxToWrite> boxes;
    for (const auto& tensor : tensors) {
      if (file >= tensor.boxes.size()) continue;
      const Box& box = tensor.boxes[file];
      memory.emplace_back(static_cast<size_t>(box.numel() * item_bytes(tensor.dtype)));
      cut(tensor, box, memory.back(), salt);
      boxes.push_back({tensor.key, tensor.dtype, box, memory.back()});
    }
    const std::string name = shard_name(static_cast<int64_t>(file), static_cast<int64_t>(num_files));
    std::string sum;
    write_shard(real_fs(), directory + "/" + name, boxes, {}, with_sha256 ? &sum : nullptr);
    manifest.files.push_back(describe_shard(real_fs(), directory, name));
    manifest.files.back().sha256 = sum;
  }
  for (const auto& tensor : tensors) {
    StoredTensor& stored = manifest.tensors[tensor.key] = {tensor.dtype, tensor.shape, {}};
    for (size_t i = 0; i < tensor.boxes.size(); ++i) stored.boxes.push_back({tensor.boxes[i], i});
  }
  write_durable(real_fs(), directory + "/" + kManifestName, encode_manifest(manifest));
}

/// Damages one file of a checkpoint folder at random; `other` holds files of the same names to splice in.
/// @return what was done, empty when the bytes happen to be as before.
std::string damage(const std::string& directory, const std::string& other, std::mt19937& random);

}  // namespace lockstep::format
