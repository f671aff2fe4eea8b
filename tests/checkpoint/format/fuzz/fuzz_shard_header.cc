// Any text as the header of a shard: two bytes say how much data follows, the rest is the JSON. What parses is also
// opened as a checkpoint whose manifest believes it, so that the checksums in its metadata are parsed too.
#include <cstring>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

#include "fuzz_target.h"
#include "memory_fs.h"

namespace lockstep::format {
namespace {

void check_header(const TensorHeader& header, uint64_t file_bytes) {
  uint64_t end = 0;
  for (const TensorEntry& entry : header.tensors) {
    FUZZ_CHECK(is_tensor_name(entry.name) && entry.begin == end && entry.begin <= entry.end);
    FUZZ_CHECK(static_cast<uint64_t>(checked_numel(entry.shape, "") * item_bytes(entry.dtype)) ==
               entry.end - entry.begin);
    end = entry.end;
  }
  FUZZ_CHECK(header.data_start + end == file_bytes);
}

void check_encoding(TensorHeader header) {
  const std::string head = encode_header(header.tensors, header.metadata);
  const uint64_t data_bytes = header.tensors.empty() ? 0 : header.tensors.back().end;
  const TensorHeader again = parse_header(head, head.size() + data_bytes, "again");
  FUZZ_CHECK(again.metadata == header.metadata && again.tensors.size() == header.tensors.size());
}

void open_checkpoint(const TensorHeader& header, const std::string& head, uint64_t file_bytes) {
  MemoryFs fs;
  Manifest manifest;
  manifest.files = {{"s", file_bytes, crc32c(head)}};
  for (const TensorEntry& entry : header.tensors) {
    std::vector<StoredBox> boxes;
    if (entry.end > entry.begin) boxes = {{Box::whole(entry.shape), 0}};
    manifest.tensors[entry.name] = {entry.dtype, entry.shape, boxes};
  }
  fs.files["c/MANIFEST"] = encode_manifest(manifest);
  fs.files["c/s"] = head;
  fs.files["c/s"].resize(file_bytes);
  for (const std::string& problem : verify(fs, "c", {}, 1)) FUZZ_CHECK(!problem.empty());
}

}  // namespace
}  // namespace lockstep::format

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::format;
  uint16_t data_bytes = 0;
  if (size < sizeof(data_bytes)) return 0;
  std::memcpy(&data_bytes, data, sizeof(data_bytes));
  const uint64_t length = size - sizeof(data_bytes);
  std::string head(sizeof(length) + length, '\0');
  std::memcpy(head.data(), &length, sizeof(length));
  std::memcpy(head.data() + sizeof(length), data + sizeof(data_bytes), length);
  const uint64_t file_bytes = head.size() + data_bytes;
  TensorHeader header;
  try {
    header = parse_header(head, file_bytes, "s");
  } catch (const lockstep::CorruptData&) {
    return 0;
  }
  check_header(header, file_bytes);
  check_encoding(header);
  open_checkpoint(header, head, file_bytes);
  return 0;
}
