#include <algorithm>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

#include "strict_json.h"

namespace lockstep::format {
namespace {

constexpr const char* kCrcKey = "LOCKSTEP_CRC32C";

uint64_t total_bytes(const Manifest& manifest) {
  uint64_t bytes = 0;
  for (const auto& file : manifest.files) bytes += file.bytes;
  return bytes;
}

}  // namespace

Reader::Reader(Fs& fs, const std::string& path)
    : path_(path),
      manifest_(
          parse_manifest(read_text(fs, path + "/" + kManifestName, kMaxManifestBytes), path + "/" + kManifestName)) {
  open_shards(fs);
}

void Reader::open_shards(Fs& fs) {
  for (const StoredFile& stored : manifest_.files) {
    const std::string path = path_ + "/" + stored.name;
    Shard shard;
    shard.file = fs.open_read(path);
    if (shard.file->size() != stored.bytes) {
      throw CorruptData("'" + path + "' has " + std::to_string(shard.file->size()) + " bytes, the manifest says " +
                        std::to_string(stored.bytes));
    }
    shard.header = read_header(*shard.file, path);
    std::vector<std::byte> head(shard.header.data_start);
    shard.file->read_at(0, head);
    if (crc32c(head) != stored.header_crc) throw CorruptData("'" + path + "': the header fails its checksum");
    const auto crcs = strict_parse(shard.header.metadata[kCrcKey], path);
    if (!crcs.is_object()) throw CorruptData("'" + path + "' has no chunk checksums");
    for (const auto& [name, hex] : crcs.items()) shard.crcs[name] = hex.is_string() ? hex.get<std::string>() : "";
    shards_.push_back(std::move(shard));
  }
  for (Shard& shard : shards_) {
    for (const TensorEntry& tensor : shard.header.tensors) shard.by_name[tensor.name] = &tensor;
  }
}

const TensorEntry& Reader::entry(const StoredBox& stored, const std::string& key) const {
  const Shard& shard = shards_[stored.file];
  const auto found = shard.by_name.find(key);
  const std::string what = "tensor '" + key + "' in '" + path_ + "/" + manifest_.files[stored.file].name + "'";
  if (found == shard.by_name.end()) throw CorruptData(what + " is missing");
  const StoredTensor& tensor = manifest_.tensors.at(key);
  if (found->second->shape != stored.box.sizes || found->second->dtype != tensor.dtype)
    throw CorruptData(what + " has another shape or dtype than the manifest says");
  return *found->second;
}

void Reader::read_stored(const StoredBox& stored, const std::string& key, std::span<std::byte> target) const {
  const Shard& shard = shards_[stored.file];
  const TensorEntry& tensor = entry(stored, key);
  const std::string what = "tensor '" + key + "' in '" + path_ + "/" + manifest_.files[stored.file].name + "'";
  const auto crcs = shard.crcs.find(key);
  const uint64_t bytes = tensor.end - tensor.begin, chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
  LOCKSTEP_CHECK(target.size() == bytes) << what << " has " << bytes << " bytes, the target " << target.size();
  if (crcs == shard.crcs.end() || crcs->second.size() != 8 * chunks) throw CorruptData(what + " has no checksums");
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    const uint64_t begin = chunk * kChunkBytes;
    const auto part = target.subspan(begin, std::min(kChunkBytes, bytes - begin));
    shard.file->read_at(shard.header.data_start + tensor.begin + begin, part);
    if (hex8(crc32c(part)) != crcs->second.substr(8 * chunk, 8)) {
      throw CorruptData(what + ": chunk " + std::to_string(chunk) + " (bytes " + std::to_string(begin) + " to " +
                        std::to_string(begin + part.size()) + ") fails its checksum");
    }
  }
}

void Reader::read(const std::string& key, const Box& wanted, std::span<std::byte> target) const {
  const StoredTensor& tensor = manifest_.tensors.at(key);
  const int64_t item = item_bytes(tensor.dtype);
  std::vector<std::byte> scratch;
  for (const StoredBox& stored : tensor.boxes) {
    const Box part = intersection(stored.box, wanted);
    if (part.numel() == 0) continue;
    if (stored.box == wanted) return read_stored(stored, key, target);
    scratch.resize(static_cast<size_t>(stored.box.numel() * item));
    read_stored(stored, key, scratch);
    copy_box(part, stored.box, scratch.data(), wanted, target.data(), item);
  }
}

std::string Reader::tensor_digest(const std::string& key) const {
  const StoredTensor& tensor = manifest_.tensors.at(key);
  const Box whole = Box::whole(tensor.shape);
  std::vector<std::byte> bytes(static_cast<size_t>(whole.numel() * item_bytes(tensor.dtype)));
  read(key, whole, bytes);
  return digest(bytes);
}

CheckpointDigests compute_digests(const Reader& reader, const std::function<void(uint64_t, uint64_t)>& progress) {
  CheckpointDigests digests;
  std::string weights, optimizer;
  const uint64_t total = total_bytes(reader.manifest());
  uint64_t done = 0;
  for (const auto& [key, tensor] : reader.manifest().tensors) {  // a map: name order
    const std::string value = digests.tensors[key] = reader.tensor_digest(key);
    std::string line = key + " " + tensor.dtype;
    for (const int64_t size : tensor.shape) line += " " + std::to_string(size);
    const std::string section = section_of(key);
    (section == "weights" || section == "buffers" ? weights : optimizer) += line + " " + value + "\n";
    done += static_cast<uint64_t>(Box::whole(tensor.shape).numel() * item_bytes(tensor.dtype));
    if (progress) progress(done, total);
  }
  digests.weights = digest(weights);
  digests.optimizer = digest(optimizer);
  return digests;
}

std::vector<std::string> verify(Fs& fs, const std::string& path,
                                const std::function<void(uint64_t, uint64_t)>& progress) {
  std::vector<std::string> problems;
  try {
    const Reader reader(fs, path);
    const uint64_t total = total_bytes(reader.manifest());
    uint64_t done = 0;
    for (const auto& [key, tensor] : reader.manifest().tensors) {
      try {
        reader.tensor_digest(key);
      } catch (const Error& error) {
        problems.emplace_back(error.what());
      }
      done += static_cast<uint64_t>(Box::whole(tensor.shape).numel() * item_bytes(tensor.dtype));
      if (progress) progress(done, total);
    }
  } catch (const Error& error) {
    problems.emplace_back(error.what());
  }
  return problems;
}

}  // namespace lockstep::format
