#include <algorithm>
#include <charconv>
#include <cstring>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

#include "strict_json.h"

namespace lockstep::format {
namespace {

std::vector<uint32_t> parse_crcs(const nlohmann::json& hex, uint64_t bytes, const std::string& what) {
  const uint64_t chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
  const std::string* text = hex.is_string() ? &hex.get_ref<const std::string&>() : nullptr;
  if (text == nullptr || text->size() != 8 * chunks)
    throw CorruptData(what + " does not have " + std::to_string(chunks) + " checksums");
  std::vector<uint32_t> crcs(chunks);
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    const char* begin = text->data() + 8 * chunk;
    const auto parsed = std::from_chars(begin, begin + 8, crcs[chunk], 16);
    if (parsed.ec != std::errc() || parsed.ptr != begin + 8) throw CorruptData(what + " has a bad checksum");
  }
  return crcs;
}

// Read and checked in pieces that are still in the cache when they are checked.
constexpr uint64_t kPieceBytes = uint64_t{512} << 10;

bool is_row_major_stretch(const Box& box, const std::vector<int64_t>& shape) {
  for (size_t d = 1; d < shape.size(); ++d) {
    if (box.sizes[d] != shape[d]) return false;
  }
  return true;
}

}  // namespace

Reader::Reader(Fs& fs, const std::string& path)
    : path_(path),
      manifest_(
          parse_manifest(read_text(fs, path + "/" + kManifestName, kMaxManifestBytes), path + "/" + kManifestName)) {
  for (const StoredFile& stored : manifest_.files) open_shard(fs, stored);
  check_boxes();
}

void Reader::open_shard(Fs& fs, const StoredFile& stored) {
  const std::string path = path_ + "/" + stored.name;
  Shard shard;
  shard.file = fs.open_read(path);
  if (shard.file->size() != stored.bytes) {
    throw CorruptData("'" + path + "' has " + std::to_string(shard.file->size()) + " bytes, the manifest says " +
                      std::to_string(stored.bytes));
  }
  const std::string head = read_head(*shard.file, path);
  // Before parsing: a header that was torn or flipped is named as such, whatever it parses to.
  if (crc32c(head) != stored.header_crc) throw CorruptData("'" + path + "': the header fails its checksum");
  TensorHeader header = parse_header(head, stored.bytes, path);
  shard.data_start = header.data_start;
  const auto crcs = strict_parse(header.metadata[kCrcKey], path + " (" + kCrcKey + ")");
  if (!crcs.is_object()) throw CorruptData("'" + path + "' has no chunk checksums");
  for (TensorEntry& entry : header.tensors) {
    const auto hex = crcs.find(entry.name);
    auto parsed = parse_crcs(hex == crcs.end() ? nlohmann::json() : *hex, entry.end - entry.begin,
                             "tensor '" + entry.name + "' in '" + path + "'");
    const std::string name = entry.name;
    shard.entries.emplace(name, StoredEntry{std::move(entry), std::move(parsed)});
  }
  shards_.push_back(std::move(shard));
}

void Reader::check_boxes() const {
  for (const auto& [key, tensor] : manifest_.tensors) {
    for (const StoredBox& stored : tensor.boxes) {
      const auto found = shards_[stored.file].entries.find(key);
      if (found == shards_[stored.file].entries.end()) throw CorruptData(what(key, stored.file) + " is missing");
      if (found->second.entry.shape != stored.box.sizes || found->second.entry.dtype != tensor.dtype)
        throw CorruptData(what(key, stored.file) + " has another shape or dtype than the manifest says");
    }
  }
}

std::string Reader::what(const std::string& key, size_t file) const {
  return "tensor '" + key + "' in '" + path_ + "/" + manifest_.files[file].name + "'";
}

void for_each_chunk_run(const Box& stored, const Box& wanted, uint64_t item_bytes,
                        const std::function<void(const ChunkRun&)>& take) {
  const auto cut_run = [&](int64_t from, int64_t to, int64_t elements) {
    uint64_t position = static_cast<uint64_t>(from) * item_bytes, target = static_cast<uint64_t>(to) * item_bytes;
    const uint64_t end = position + static_cast<uint64_t>(elements) * item_bytes;
    while (position < end) {
      const uint64_t chunk = position / kChunkBytes, bytes = std::min(end, (chunk + 1) * kChunkBytes) - position;
      take({chunk, position % kChunkBytes, target, bytes});
      position += bytes;
      target += bytes;
    }
  };
  for_each_run(intersection(stored, wanted), stored, wanted, cut_run);
}

void Reader::read_chunk(const std::string& key, const StoredBox& box, uint64_t chunk,
                        std::span<std::byte> target) const {
  const Shard& shard = shards_[box.file];
  const StoredEntry& stored = shard.entries.at(key);
  const uint64_t begin = chunk * kChunkBytes;
  uint32_t crc = 0;
  for (uint64_t done = 0; done < target.size(); done += kPieceBytes) {
    const auto piece = target.subspan(done, std::min<uint64_t>(kPieceBytes, target.size() - done));
    shard.file->read_at(shard.data_start + stored.entry.begin + begin + done, piece);
    crc = crc32c(piece, crc);
  }
  if (crc != stored.chunk_crcs[chunk]) {
    throw CorruptData(what(key, box.file) + ": chunk " + std::to_string(chunk) + " (bytes " + std::to_string(begin) +
                      " to " + std::to_string(begin + target.size()) + " of the tensor) fails its checksum");
  }
}

// Runs rise in the stored box, so each chunk is needed for one stretch of time: one chunk of scratch is enough.
void Reader::copy_part(const std::string& key, const StoredBox& stored, const Box& wanted,
                       std::span<std::byte> target) const {
  const auto item = static_cast<uint64_t>(item_bytes(manifest_.tensors.at(key).dtype));
  const uint64_t box_bytes = static_cast<uint64_t>(stored.box.numel()) * item;
  std::vector<std::byte> scratch;
  uint64_t in_scratch = UINT64_MAX;
  for_each_chunk_run(stored.box, wanted, item, [&](const ChunkRun& run) {
    const uint64_t chunk_bytes = std::min(kChunkBytes, box_bytes - run.chunk * kChunkBytes);
    if (run.bytes == chunk_bytes) return read_chunk(key, stored, run.chunk, target.subspan(run.target, run.bytes));
    if (in_scratch != run.chunk) {
      scratch.resize(chunk_bytes);
      read_chunk(key, stored, run.chunk, scratch);
      in_scratch = run.chunk;
    }
    std::memcpy(target.data() + run.target, scratch.data() + run.offset, run.bytes);
  });
}

void Reader::read(const std::string& key, const Box& wanted, std::span<std::byte> target) const {
  const StoredTensor& tensor = manifest_.tensors.at(key);
  LOCKSTEP_CHECK(target.size() == static_cast<uint64_t>(wanted.numel() * item_bytes(tensor.dtype)))
      << "tensor '" << key << "': the target has " << target.size() << " bytes, the box wanted has " << wanted.numel()
      << " elements";
  for (const StoredBox& stored : tensor.boxes) copy_part(key, stored, wanted, target);
}

void Reader::stream(const std::string& key, const StoredBox& stored, const TakeChunk& take) const {
  const StoredEntry& entry = shards_[stored.file].entries.at(key);
  const uint64_t bytes = entry.entry.end - entry.entry.begin;
  std::vector<std::byte> buffer(std::min(kChunkBytes, bytes));
  for (uint64_t chunk = 0; chunk < entry.chunk_crcs.size(); ++chunk) {
    const auto part = std::span(buffer).first(std::min(kChunkBytes, bytes - chunk * kChunkBytes));
    read_chunk(key, stored, chunk, part);
    take(part);
  }
}

std::string Reader::tensor_digest(const std::string& key) const {
  const StoredTensor& tensor = manifest_.tensors.at(key);
  std::vector<StoredBox> boxes = tensor.boxes;
  std::sort(boxes.begin(), boxes.end(), [](const auto& a, const auto& b) { return a.box < b.box; });
  if (std::all_of(boxes.begin(), boxes.end(),
                  [&](const auto& stored) { return is_row_major_stretch(stored.box, tensor.shape); })) {
    Digester digester;
    for (const StoredBox& stored : boxes) stream(key, stored, [&](auto bytes) { digester.add(bytes); });
    return digester.hex();
  }
  const Box whole = Box::whole(tensor.shape);
  std::vector<std::byte> bytes(static_cast<size_t>(whole.numel() * item_bytes(tensor.dtype)));
  read(key, whole, bytes);
  return digest(bytes);
}

void Reader::verify_tensor(const std::string& key) const {
  for (const StoredBox& stored : manifest_.tensors.at(key).boxes) stream(key, stored, [](auto) {});
}

}  // namespace lockstep::format
