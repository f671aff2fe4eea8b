#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep::format {

inline constexpr uint64_t kChunkBytes = 4 << 20;          ///< one checksum each
inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;  ///< the safetensors reference's own limit
inline constexpr size_t kMaxNameBytes = 1024;
inline constexpr size_t kMaxRank = 16;

/// Key of `__metadata__` whose value is the JSON object {"tensor": "8 hex digits a chunk"}.
inline constexpr const char* kCrcKey = "LOCKSTEP_CRC32C";

/// One tensor of a safetensors file. Offsets count from the start of the data.
struct TensorEntry {
  std::string name;
  std::string dtype;  ///< "F32", "BF16", "I64", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;
};

struct TensorHeader {
  std::vector<TensorEntry> tensors;  ///< in order of their data
  std::map<std::string, std::string> metadata;
  uint64_t data_start = 0;  ///< bytes before the data
};

/// 1 to kMaxNameBytes bytes without control characters, and not "__metadata__".
bool is_tensor_name(std::string_view name);

/// Bytes of one element. @throws CorruptData for a dtype safetensors does not know.
int64_t item_bytes(const std::string& dtype);

/// Elements of a shape. @throws CorruptData negative sizes, more than kMaxRank dims, or 2^63 overflow.
int64_t checked_numel(const std::vector<int64_t>& shape, const std::string& what);

/// The header as bytes, length field and padding included: the data starts at a multiple of 64, which suits both the
/// reference reader (8) and memory that is mapped. Tensors get their offsets here, in the order given.
/// @throws CheckFailed a name or shape that parse_header() would refuse.
std::string encode_header(std::vector<TensorEntry>& tensors, const std::map<std::string, std::string>& metadata);

/// The length field and the header's JSON as they stand in the file, padding included. @throws CorruptData a length
/// over kMaxHeaderBytes or past the file's end, before anything is allocated for it; IoError.
std::string read_head(const File& file, const std::string& path);

/// Parses and checks what read_head() gave (`file_bytes`: size of the whole file): syntax, duplicate names, dtypes,
/// ranks, sizes that match dtype and shape, no holes, no overlaps, and data that fills the file exactly. Padding is not
/// asked for: other writers leave it out. Takes at most the head's size + 64 MiB of memory, 128 MiB in all.
/// @throws CorruptData naming file and tensor.
TensorHeader parse_header(const std::string& head, uint64_t file_bytes, const std::string& path);

/// Both in one.
TensorHeader read_header(const File& file, const std::string& path);

}  // namespace lockstep::format
