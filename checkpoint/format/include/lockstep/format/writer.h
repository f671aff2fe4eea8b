#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>
#include <lockstep/format/box.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/progress.h>
#include <lockstep/format/tensor_file.h>

namespace lockstep::format {

/// One box to write: `bytes` is its memory in row-major order, read once, for a SHA-256 twice.
struct BoxToWrite {
  std::string key;
  std::string dtype;
  Box box;
  std::span<const std::byte> bytes;
};

/// Writes one shard file durably: space reserved first, data with a CRC32C a chunk, then the header whose room was
/// kept, fdatasync, close. The file is a valid safetensors file; its metadata lets torch's HuggingFaceStorageReader
/// reshard it.
/// @param sha256 where the SHA-256 of the file goes, as it was meant to be written; null: none is made.
/// @throws IoError. CheckFailed: bytes that do not fit their box.
void write_shard(Fs& fs, const std::string& path, const std::vector<BoxToWrite>& boxes,
                 const ProgressCallback& progress = {}, std::string* sha256 = nullptr);

/// The same file from bytes that come in its order, a stretch at a time: for tensors that need not lie in memory
/// together.
class ShardWriter {
 public:
  /// Reserves the space. @param boxes in the order of their data; their `bytes` are not looked at. @throws IoError.
  ShardWriter(Fs& fs, const std::string& path, std::vector<BoxToWrite> boxes);
  /// The next bytes of the data; a stretch may end within a tensor or go on into the next. @throws IoError.
  void append(std::span<const std::byte> bytes);
  /// Header, fdatasync, close. @return the header: the file's bytes before the data. @throws IoError; CheckFailed when
  /// bytes are missing.
  std::string finish();

 private:
  std::string header();

  std::string path_;
  std::vector<BoxToWrite> boxes_;
  std::vector<TensorEntry> entries_;
  std::vector<std::string> crcs_;  // by tensor: 8 hex digits a chunk
  uint64_t header_bytes_ = 0, data_bytes_ = 0, position_ = 0;
  size_t tensor_ = 0;  // that `position_` lies in
  uint32_t crc_ = 0;   // of the chunk so far
  std::unique_ptr<File> file_;
};

/// A shard as a manifest lists it, from opening the finished file anew and parsing its header. @throws CorruptData,
/// IoError.
StoredFile describe_shard(Fs& fs, const std::string& directory, const std::string& name);

}  // namespace lockstep::format
