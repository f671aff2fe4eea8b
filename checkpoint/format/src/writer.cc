#include <algorithm>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/tensor_file.h>
#include <lockstep/format/writer.h>

namespace lockstep::format {
namespace {

std::string header_with(std::vector<TensorEntry>& entries, const std::vector<BoxToWrite>& boxes,
                        const std::vector<std::string>& crcs) {
  nlohmann::ordered_json sharding = nlohmann::ordered_json::object(), checksums = nlohmann::ordered_json::object();
  for (size_t i = 0; i < boxes.size(); ++i) {
    sharding[boxes[i].key] = {{"saved_offsets", boxes[i].box.offsets}};
    checksums[boxes[i].key] = crcs[i];
  }
  return encode_header(
      entries,
      {{"format", "pt"}, {"DCP_VERSION", "1.0"}, {"DCP_SHARDING_INFO", sharding.dump()}, {kCrcKey, checksums.dump()}});
}

}  // namespace

void write_shard(Fs& fs, const std::string& path, const std::vector<BoxToWrite>& boxes,
                 const ProgressCallback& progress) {
  std::vector<TensorEntry> entries;
  std::vector<std::string> crcs;
  uint64_t data_bytes = 0;
  for (const BoxToWrite& box : boxes) {
    LOCKSTEP_CHECK(box.bytes.size() == static_cast<uint64_t>(box.box.numel() * item_bytes(box.dtype)))
        << "tensor '" << box.key << "' brings " << box.bytes.size() << " bytes for " << box.box.numel() << " elements";
    entries.push_back({.name = box.key, .dtype = box.dtype, .shape = box.box.sizes, .begin = 0, .end = 0});
    crcs.emplace_back(8 * ((box.bytes.size() + kChunkBytes - 1) / kChunkBytes), '0');
    data_bytes += box.bytes.size();
  }
  const size_t header_bytes =
      header_with(entries, boxes, crcs).size();  // checksums have a fixed width, so this is final
  const auto file = fs.create_exclusive(path);
  file->allocate(header_bytes + data_bytes);
  for (size_t i = 0; i < boxes.size(); ++i) {
    const auto bytes = boxes[i].bytes;
    for (uint64_t begin = 0; begin < bytes.size(); begin += kChunkBytes) {
      const auto chunk = bytes.subspan(begin, std::min<uint64_t>(kChunkBytes, bytes.size() - begin));
      crcs[i].replace(8 * (begin / kChunkBytes), 8, hex8(crc32c(chunk)));
      file->write_at(header_bytes + entries[i].begin + begin, chunk);
      if (progress) progress(entries[i].begin + begin + chunk.size(), data_bytes);
    }
  }
  const std::string header = header_with(entries, boxes, crcs);
  LOCKSTEP_CHECK(header.size() == header_bytes) << "the header of '" << path << "' changed its size";
  file->write_at(0, std::as_bytes(std::span(header.data(), header.size())));
  file->sync();
  file->close();
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
