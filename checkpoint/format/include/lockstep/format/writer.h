#pragma once

#include <span>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>
#include <lockstep/format/box.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/progress.h>

namespace lockstep::format {

/// One box to write: `bytes` is its memory in row-major order, read once.
struct BoxToWrite {
  std::string key;
  std::string dtype;
  Box box;
  std::span<const std::byte> bytes;
};

/// Writes one shard file durably: space reserved first, data with a CRC32C a chunk, then the header whose room was
/// kept, fdatasync, close. The file is a valid safetensors file; its metadata lets torch's HuggingFaceStorageReader
/// reshard it. @throws IoError.
/// CheckFailed: bytes that do not fit their box.
void write_shard(Fs& fs, const std::string& path, const std::vector<BoxToWrite>& boxes,
                 const ProgressCallback& progress = {});

/// A shard as a manifest lists it, from opening the finished file anew and parsing its header. @throws CorruptData,
/// IoError.
StoredFile describe_shard(Fs& fs, const std::string& directory, const std::string& name);

}  // namespace lockstep::format
