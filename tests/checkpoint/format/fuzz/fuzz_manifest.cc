// Any text as a manifest, under a right checksum, as somebody who tampers would write it.
#include <algorithm>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

#include "fuzz_target.h"

namespace lockstep::format {
namespace {

void check_limits(const Manifest& manifest) {
  FUZZ_CHECK(manifest.step >= 0 && manifest.samples >= 0 && manifest.world_size >= 0);
  for (const StoredFile& file : manifest.files) {
    FUZZ_CHECK(!file.name.empty() && file.name.size() <= 200 && file.name[0] != '.');
    FUZZ_CHECK(file.name.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") ==
               std::string::npos);
  }
  for (const auto& [key, tensor] : manifest.tensors) {
    FUZZ_CHECK(is_tensor_name(key) && tensor.shape.size() <= kMaxRank);
    std::vector<Box> boxes;
    for (const StoredBox& stored : tensor.boxes) {
      FUZZ_CHECK(stored.file < manifest.files.size());
      boxes.push_back(stored.box);
    }
    FUZZ_CHECK(tiles(boxes, tensor.shape));
  }
}

}  // namespace
}  // namespace lockstep::format

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::format;
  const std::string body(reinterpret_cast<const char*>(data), size);
  Manifest manifest;
  try {
    manifest = parse_manifest(body + "crc32c " + hex8(crc32c(body)) + "\n", "MANIFEST");
  } catch (const lockstep::CorruptData&) {
    return 0;
  } catch (const lockstep::ConfigError&) {  // another version
    return 0;
  }
  check_limits(manifest);
  const std::string once = encode_manifest(manifest);
  FUZZ_CHECK(encode_manifest(parse_manifest(once, "MANIFEST")) == once);
  return 0;
}
