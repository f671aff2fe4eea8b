// Any bytes as a token file (llm.c's headers, nanoGPT's bare ids), and as Megatron's index beside a file of the size it
// describes, by another way of counting, or not of that size.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string_view>
#include <vector>

#include <lockstep/base/error.h>
#include <lockstep/data/token_format.h>

#include "fuzz_target.h"
#include "token_file.h"

namespace lockstep::data {
namespace {

constexpr int64_t kVocabSize = 50000, kMaxTokens = 1 << 16;
constexpr size_t kIndexHeaderBytes = 34;

class Folder {
 public:
  Folder() : path_((std::filesystem::temp_directory_path() / "lockstep_token_file_XXXXXX").string()) {
    FUZZ_CHECK(mkdtemp(path_.data()) != nullptr);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string write(const char* name, std::string_view bytes) const {
    std::ofstream(path_ + "/" + name, std::ios::binary | std::ios::trunc) << bytes;
    return path_ + "/" + name;
  }

 private:
  std::string path_;
};

// @return the number of its tokens; nullopt: refused.
std::optional<int64_t> try_file(const std::string& path) {
  try {
    const auto file = open_token_file(path);
    const int64_t n = file->num_tokens();
    FUZZ_CHECK(n >= 0 && !file->fingerprint().empty());
    if (n > kMaxTokens) return n;
    std::vector<int64_t> tokens(static_cast<size_t>(n));
    try {
      file->read(0, tokens, kVocabSize);
    } catch (const CorruptData&) {  // an id outside of the vocabulary
      return n;
    }
    for (const int64_t id : tokens) FUZZ_CHECK(id >= 0 && id < kVocabSize);
    return n;
  } catch (const CorruptData&) {
    return std::nullopt;
  }
}

template <typename T>
T value_at(std::string_view bytes, size_t offset) {
  T value{};
  if (offset + sizeof(T) <= bytes.size()) std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

// How many tokens an index describes, and the bytes of each. Nothing where one of its numbers cannot be.
struct Described {
  int64_t tokens = 0, item_bytes = 0;
};
std::optional<Described> describe(std::string_view index) {
  constexpr int64_t kItemBytes[] = {0, 1, 1, 2, 4, 8, 0, 0, 2};
  if (!index.starts_with(std::string_view("MMIDIDX\0\0\1\0\0\0\0\0\0\0", 17)) || index.size() < kIndexHeaderBytes)
    return std::nullopt;
  const auto code = value_at<uint8_t>(index, 17);
  const auto sequences = value_at<uint64_t>(index, 18), documents = value_at<uint64_t>(index, 26);
  const double bytes = 34 + 12 * static_cast<double>(sequences) + 8 * static_cast<double>(documents);
  if (code >= std::size(kItemBytes) || kItemBytes[code] == 0 || bytes > static_cast<double>(index.size()))
    return std::nullopt;
  Described described{0, kItemBytes[code]};
  for (size_t i = 0; i < sequences; ++i) {
    const auto length = value_at<int32_t>(index, kIndexHeaderBytes + 4 * i);
    if (length < 0) return std::nullopt;
    described.tokens += length;
  }
  return described;
}

void try_index(const Folder& folder, std::string_view index) {
  folder.write("megatron.idx", index);
  const std::optional<Described> described = describe(index);
  const bool is_small = described && described->tokens <= kMaxTokens;
  const auto size = is_small ? static_cast<size_t>(described->tokens * described->item_bytes) : 0;
  const std::optional<int64_t> found = try_file(folder.write("megatron.bin", std::string(size, '\0')));
  FUZZ_CHECK(found == (is_small ? std::optional(described->tokens) : std::nullopt));
  FUZZ_CHECK(!try_file(folder.write("megatron.bin", std::string(size + 1, '\0'))));
}

}  // namespace
}  // namespace lockstep::data

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::data;
  static const Folder folder;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const std::optional<int64_t> tokens = try_file(folder.write("tokens.bin", bytes));
  const auto magic = value_at<int32_t>(bytes, 0);
  if (tokens && size >= kTokenHeaderBytes && magic == kTokenMagicU32) {
    FUZZ_CHECK(kTokenHeaderBytes + 4 * *tokens == size);
  } else if (tokens) {
    FUZZ_CHECK(2 * *tokens == static_cast<int64_t>(size) || kTokenHeaderBytes + 2 * *tokens == size);
  }
  try_index(folder, bytes);
  return 0;
}
