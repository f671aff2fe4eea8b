#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <set>

#include <pwd.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

#include "json_reader.h"

namespace lockstep::format {
namespace {

std::vector<uint32_t> parse_crcs(std::string_view text, uint64_t bytes, const std::string& what) {
  const uint64_t chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
  if (text.size() != 8 * chunks) throw CorruptData(what + " does not have " + std::to_string(chunks) + " checksums");
  std::vector<uint32_t> crcs(chunks);
  for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
    const char* begin = text.data() + 8 * chunk;
    const auto parsed = std::from_chars(begin, begin + 8, crcs[chunk], 16);
    if (parsed.ec != std::errc() || parsed.ptr != begin + 8) throw CorruptData(what + " has a bad checksum");
  }
  return crcs;
}

std::string name_of(uint32_t user) {
  std::array<char, 4096> buffer{};
  passwd entry{}, *found = nullptr;
  const bool has_name = getpwuid_r(user, &entry, buffer.data(), buffer.size(), &found) == 0 && found != nullptr;
  return (has_name ? std::string(entry.pw_name) + " " : "") + "(uid " + std::to_string(user) + ")";
}

std::string tensor_in(const std::string& key, const std::string& path) {
  return "tensor '" + key + "' in '" + path + "'";
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

Reader::Reader(Fs& fs, const std::string& path, Trust trust) : path_(path), trust_(trust) {
  // Held open, so that every file comes from the folder that the manifest came from.
  const auto folder = fs.open_folder(path);
  const std::string text = read_all(*open_trusted(*folder, kManifestName), file_path(kManifestName), kMaxManifestBytes);
  manifest_digest_ = digest(text);
  manifest_sha256_ = sha256(text);
  manifest_ = parse_manifest(text, file_path(kManifestName));
  for (const StoredFile& stored : manifest_.files) open_shard(*folder, stored);
  check_boxes();
}

std::string Reader::owner_name() const { return name_of(owner_); }

std::unique_ptr<File> Reader::open_trusted(Folder& folder, const std::string& name) {
  auto file = folder.open_read(name);
  if (file->owner() != geteuid()) {
    owner_ = file->owner();
    if (trust_ == Trust::kOwn) {
      throw ConfigError(
          "'" + file_path(name) + "' belongs to " + name_of(owner_) + ", not to you, " + name_of(geteuid()) +
          ". Mend: copy it, or pass --trust_foreign_checkpoint: what is loaded decides what a model does");
    }
  }
  return file;
}

TensorHeader Reader::read_trusted_header(const File& file, const StoredFile& stored) const {
  const std::string path = file_path(stored.name);
  const std::string head = read_head(file, path);
  // Before parsing: a header that was torn or flipped is named as such, whatever it parses to.
  if (crc32c(head) != stored.header_crc) throw CorruptData("'" + path + "': the header fails its checksum");
  return parse_header(head, stored.bytes, path);
}

void Reader::open_shard(Folder& folder, const StoredFile& stored) {
  const std::string path = file_path(stored.name);
  Shard shard;
  shard.file = open_trusted(folder, stored.name);
  if (shard.file->size() != stored.bytes) {
    throw CorruptData("'" + path + "' has " + std::to_string(shard.file->size()) + " bytes, the manifest says " +
                      std::to_string(stored.bytes));
  }
  TensorHeader header = read_trusted_header(*shard.file, stored);
  shard.data_start = header.data_start;
  for (TensorEntry& entry : header.tensors) {
    const std::string name = entry.name;
    shard.entries.emplace(name, StoredEntry{std::move(entry), {}});
  }
  JsonReader json(header.metadata[kCrcKey], "'" + path + "' (" + kCrcKey + ")");
  std::set<std::string_view> checked;
  json.enter_object();
  while (const auto key = json.next_key()) {
    const auto found = shard.entries.find(std::string(*key));
    if (found == shard.entries.end()) continue;
    StoredEntry& stored_entry = found->second;
    stored_entry.chunk_crcs =
        parse_crcs(json.read_text(), stored_entry.entry.end - stored_entry.entry.begin, tensor_in(found->first, path));
    checked.insert(found->first);
  }
  json.finish();
  for (const auto& [name, entry] : shard.entries) {
    if (!checked.contains(name)) throw CorruptData(tensor_in(name, path) + " has no checksums");
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
  return tensor_in(key, file_path(manifest_.files[file].name));
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

void Reader::verify_sha256(size_t file) const {
  const StoredFile& stored = manifest_.files[file];
  std::vector<std::byte> buffer(std::min(kPieceBytes, stored.bytes));
  Sha256 sum;
  for (uint64_t done = 0; done < stored.bytes; done += buffer.size()) {
    const auto piece = std::span(buffer).first(std::min<uint64_t>(buffer.size(), stored.bytes - done));
    shards_[file].file->read_at(done, piece);
    sum.add(piece);
  }
  if (const std::string found = sum.hex(); found != stored.sha256) {
    throw CorruptData("'" + file_path(stored.name) + "' has the SHA-256 " + found + ", the manifest says " +
                      stored.sha256);
  }
}

void Reader::verify_tensor(const std::string& key) const {
  for (const StoredBox& stored : manifest_.tensors.at(key).boxes) stream(key, stored, [](auto) {});
}

}  // namespace lockstep::format
