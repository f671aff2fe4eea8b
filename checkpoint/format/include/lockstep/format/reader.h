#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

namespace lockstep::format {

/// A checkpoint opened for reading: manifest, all shard headers and sizes are checked on opening, every data byte when
/// it is read.
class Reader {
 public:
  /// @throws CorruptData, IoError.
  Reader(Fs& fs, const std::string& path);

  const Manifest& manifest() const { return manifest_; }
  const std::string& path() const { return path_; }

  /// Fills `target` (laid out as `wanted`, a box of tensor `key`) from whatever boxes are stored; each chunk's CRC is
  /// checked in memory before its bytes count. @throws CorruptData naming file, tensor and chunk.
  void read(const std::string& key, const Box& wanted, std::span<std::byte> target) const;

  /// XXH3-128 of the global tensor in row-major order: the same for any layout it was saved in.
  std::string tensor_digest(const std::string& key) const;

 private:
  struct Shard {
    std::unique_ptr<File> file;
    TensorHeader header;
    std::map<std::string, const TensorEntry*> by_name;
    std::map<std::string, std::string> crcs;  // 8 hex digits a chunk
  };
  void open_shards(Fs& fs);
  const TensorEntry& entry(const StoredBox& stored, const std::string& key) const;
  void read_stored(const StoredBox& stored, const std::string& key, std::span<std::byte> target) const;

  std::string path_;
  Manifest manifest_;
  std::vector<Shard> shards_;
};

/// Digests over (name, dtype, shape, digest) of all tensors of a kind, in name order.
struct CheckpointDigests {
  std::map<std::string, std::string> tensors;  ///< by key
  std::string weights;                         ///< weights and buffers
  std::string optimizer;                       ///< every other section
};
/// Reads every byte. `progress` is told bytes done and in all, and may be empty.
CheckpointDigests compute_digests(const Reader& reader, const std::function<void(uint64_t, uint64_t)>& progress = {});

/// Everything wrong with a checkpoint, one message each; empty: every byte is good. Never throws for corrupt data.
std::vector<std::string> verify(Fs& fs, const std::string& path,
                                const std::function<void(uint64_t, uint64_t)>& progress = {});

}  // namespace lockstep::format
