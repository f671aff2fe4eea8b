#include <algorithm>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/tensor_file.h>
#include <lockstep/format/writer.h>

namespace lockstep::format {

ShardWriter::ShardWriter(Fs& fs, const std::string& path, std::vector<BoxToWrite> boxes)
    : path_(path), boxes_(std::move(boxes)) {
  for (const BoxToWrite& box : boxes_) {
    const auto bytes = static_cast<uint64_t>(box.box.numel() * item_bytes(box.dtype));
    entries_.push_back({.name = box.key, .dtype = box.dtype, .shape = box.box.sizes, .begin = 0, .end = 0});
    crcs_.emplace_back(8 * ((bytes + kChunkBytes - 1) / kChunkBytes), '0');
    data_bytes_ += bytes;
  }
  header_bytes_ = header().size();  // checksums have a fixed width, so this is final
  file_ = fs.create_exclusive(path);
  file_->allocate(header_bytes_ + data_bytes_);
}

std::string ShardWriter::header() {
  nlohmann::ordered_json sharding = nlohmann::ordered_json::object(), checksums = nlohmann::ordered_json::object();
  for (size_t i = 0; i < boxes_.size(); ++i) {
    sharding[boxes_[i].key] = {{"saved_offsets", boxes_[i].box.offsets}};
    checksums[boxes_[i].key] = crcs_[i];
  }
  return encode_header(
      entries_,
      {{"format", "pt"}, {"DCP_VERSION", "1.0"}, {"DCP_SHARDING_INFO", sharding.dump()}, {kCrcKey, checksums.dump()}});
}

void ShardWriter::append(std::span<const std::byte> bytes) {
  LOCKSTEP_CHECK(bytes.size() <= data_bytes_ - position_) << "'" << path_ << "' gets more bytes than its tensors have";
  while (!bytes.empty()) {
    while (position_ == entries_[tensor_].end) ++tensor_;
    const uint64_t in_tensor = position_ - entries_[tensor_].begin, in_chunk = in_tensor % kChunkBytes;
    const auto part = bytes.first(std::min({bytes.size(), kChunkBytes - in_chunk, entries_[tensor_].end - position_}));
    crc_ = crc32c(part, in_chunk == 0 ? 0 : crc_);
    crcs_[tensor_].replace(8 * (in_tensor / kChunkBytes), 8, hex8(crc_));
    file_->write_at(header_bytes_ + position_, part);
    position_ += part.size();
    bytes = bytes.subspan(part.size());
  }
}

std::string ShardWriter::finish() {
  LOCKSTEP_CHECK(position_ == data_bytes_)
      << "'" << path_ << "' got " << position_ << " bytes of data, its tensors have " << data_bytes_;
  std::string text = header();
  LOCKSTEP_CHECK(text.size() == header_bytes_) << "the header of '" << path_ << "' changed its size";
  file_->write_at(0, std::as_bytes(std::span(text.data(), text.size())));
  file_->sync();
  file_->close();
  return text;
}

void write_shard(Fs& fs, const std::string& path, const std::vector<BoxToWrite>& boxes,
                 const ProgressCallback& progress, std::string* sha256) {
  uint64_t done = 0, total = 0;
  for (const BoxToWrite& box : boxes) {
    LOCKSTEP_CHECK(box.bytes.size() == static_cast<uint64_t>(box.box.numel() * item_bytes(box.dtype)))
        << "tensor '" << box.key << "' brings " << box.bytes.size() << " bytes for " << box.box.numel() << " elements";
    total += box.bytes.size();
  }
  ShardWriter writer(fs, path, boxes);
  for (const BoxToWrite& box : boxes) {
    for (uint64_t begin = 0; begin < box.bytes.size(); begin += kChunkBytes) {
      const auto chunk = box.bytes.subspan(begin, std::min<uint64_t>(kChunkBytes, box.bytes.size() - begin));
      writer.append(chunk);
      done += chunk.size();
      if (progress) progress(done, total);
    }
  }
  const std::string head = writer.finish();
  if (sha256 == nullptr) return;
  Sha256 sum;  // after the writing: the header, which comes first, is made last
  sum.add(std::as_bytes(std::span(head.data(), head.size())));
  for (const BoxToWrite& box : boxes) sum.add(box.bytes);
  *sha256 = sum.hex();
}

StoredFile describe_shard(Fs& fs, const std::string& directory, const std::string& name) {
  const std::string path = directory + "/" + name;
  const auto file = fs.open_read(path);
  const std::string head = read_head(*file, path);
  const uint64_t bytes = file->size();
  parse_header(head, bytes, path);
  return {name, bytes, crc32c(head)};
}

}  // namespace lockstep::format
