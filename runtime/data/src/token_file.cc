#include "token_file.h"

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstring>
#include <filesystem>
#include <vector>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/data/token_format.h>

namespace lockstep::data {
namespace {

enum class Width { kU8, kI8, kU16, kI16, kI32, kU32, kI64 };

size_t bytes_of(Width width) {
  constexpr std::array<size_t, 7> kBytes = {1, 1, 2, 2, 4, 4, 8};
  return kBytes[static_cast<size_t>(width)];
}

template <typename T>
int64_t widen(const std::byte* from, int64_t* to, size_t n) {  // returns the largest id; a negative one counts as huge
  T smallest = 0, largest = 0;  // in the narrow type, which the compiler turns into vector instructions
  for (size_t i = 0; i < n; ++i) {
    T value;
    std::memcpy(&value, from + i * sizeof(T), sizeof(T));
    to[i] = static_cast<int64_t>(value);  // NOLINT(bugprone-signed-char-misuse): a negative id must stay negative
    smallest = std::min(smallest, value);
    largest = std::max(largest, value);
  }
  return smallest < 0 ? INT64_MAX : static_cast<int64_t>(largest);
}

int64_t widen(Width width, const std::byte* from, int64_t* to, size_t n) {
  switch (width) {
    case Width::kU8:
      return widen<uint8_t>(from, to, n);
    case Width::kI8:
      return widen<int8_t>(from, to, n);
    case Width::kU16:
      return widen<uint16_t>(from, to, n);
    case Width::kI16:
      return widen<int16_t>(from, to, n);
    case Width::kI32:
      return widen<int32_t>(from, to, n);
    case Width::kU32:
      return widen<uint32_t>(from, to, n);
    case Width::kI64:
      return widen<int64_t>(from, to, n);
  }
  return INT64_MAX;
}

class FlatTokenFile : public TokenFile {
 public:
  FlatTokenFile(std::string path, std::unique_ptr<File> file, uint64_t data_start, int64_t num_tokens, Width width)
      : path_(std::move(path)),
        file_(std::move(file)),
        data_start_(data_start),
        num_tokens_(num_tokens),
        width_(width) {}

  int64_t num_tokens() const override { return num_tokens_; }

  void read(int64_t first, std::span<int64_t> tokens, int64_t vocab_size) const override {
    const size_t item = bytes_of(width_);
    std::vector<std::byte> raw(tokens.size() * item);
    file_->read_at(data_start_ + static_cast<uint64_t>(first) * item, raw);
    if (widen(width_, raw.data(), tokens.data(), tokens.size()) < vocab_size) return;
    const auto bad = std::find_if(tokens.begin(), tokens.end(), [&](int64_t id) { return id < 0 || id >= vocab_size; });
    throw CorruptData("'" + path_ + "': token " + std::to_string(first + (bad - tokens.begin())) + " has id " +
                      std::to_string(*bad) + ", outside a vocabulary of " + std::to_string(vocab_size) +
                      ". Mend: set --vocab_size to the tokenizer's, or tokenize again");
  }

  std::string fingerprint() const override {
    const uint64_t size = file_->size(), part = std::min<uint64_t>(size, 1024);
    std::vector<std::byte> ends(2 * part);
    file_->read_at(0, std::span(ends).first(part));
    file_->read_at(size - part, std::span(ends).last(part));
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (const std::byte byte : ends) hash = (hash ^ static_cast<uint64_t>(byte)) * 0x100000001b3u;
    char text[32];
    std::snprintf(text, sizeof(text), " %016" PRIx64, hash);
    return std::filesystem::path(path_).filename().string() + " " + std::to_string(size) + " bytes" + text;
  }

 private:
  std::string path_;
  std::unique_ptr<File> file_;
  uint64_t data_start_;
  int64_t num_tokens_;
  Width width_;
};

template <typename T>
T read_value(const File& file, uint64_t offset) {
  T value;
  file.read_at(offset, std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

// Megatron's index: only dtype and sizes matter here; the tokens of all sequences lie one after another in the .bin.
std::unique_ptr<TokenFile> open_megatron(const std::string& path, const std::string& index_path,
                                         std::unique_ptr<File> file) {
  const auto index = real_fs().open_read(std::filesystem::canonical(index_path).string());
  std::array<char, 9> magic{};
  index->read_at(0, std::as_writable_bytes(std::span(magic)));
  if (std::memcmp(magic.data(), "MMIDIDX\0\0", 9) != 0 || read_value<uint64_t>(*index, 9) != 1)
    throw CorruptData("'" + index_path + "' is no Megatron index of version 1");
  const auto code = read_value<uint8_t>(*index, 17);
  const auto sequences = read_value<uint64_t>(*index, 18), documents = read_value<uint64_t>(*index, 26);
  if (sequences > index->size() || documents > index->size() || index->size() < 34 + 12 * sequences + 8 * documents) {
    throw CorruptData("'" + index_path + "' is too short for its " + std::to_string(sequences) + " sequences");
  }
  Width width{};
  switch (code) {
    case 1:
      width = Width::kU8;
      break;
    case 2:
      width = Width::kI8;
      break;
    case 3:
      width = Width::kI16;
      break;
    case 4:
      width = Width::kI32;
      break;
    case 5:
      width = Width::kI64;
      break;
    case 8:
      width = Width::kU16;
      break;
    default:
      throw CorruptData("'" + index_path + "' has dtype code " + std::to_string(code) + ", which is no integer");
  }
  std::vector<int32_t> lengths(sequences);
  index->read_at(34, std::as_writable_bytes(std::span(lengths)));
  int64_t tokens = 0;
  for (const int32_t length : lengths) {
    if (length < 0) throw CorruptData("'" + index_path + "' has a sequence of " + std::to_string(length) + " tokens");
    tokens += length;
  }
  if (file->size() != static_cast<uint64_t>(tokens) * bytes_of(width)) {
    throw CorruptData("'" + path + "' has " + std::to_string(file->size()) + " bytes, its index describes " +
                      std::to_string(tokens) + " tokens of " + std::to_string(bytes_of(width)) + " bytes");
  }
  return std::make_unique<FlatTokenFile>(path, std::move(file), 0, tokens, width);
}

}  // namespace

std::unique_ptr<TokenFile> open_token_file(const std::string& path) {
  // The file system refuses links, which is right for checkpoints; data folders are often full of them.
  auto file = real_fs().open_read(std::filesystem::canonical(path).string());
  const uint64_t size = file->size();
  const std::string index_path = std::filesystem::path(path).replace_extension(".idx").string();
  if (path.ends_with(".bin") && real_fs().exists(index_path)) return open_megatron(path, index_path, std::move(file));
  if (size >= kTokenHeaderBytes) {
    const auto magic = read_value<int32_t>(*file, 0), version = read_value<int32_t>(*file, 4),
               count = read_value<int32_t>(*file, 8);
    const bool is_u16 = magic == kTokenMagicU16 && version == 1, is_u32 = magic == kTokenMagicU32 && version == 7;
    if (magic == kTokenMagicU16 || magic == kTokenMagicU32) {
      const Width width = is_u32 ? Width::kU32 : Width::kU16;
      if (!is_u16 && !is_u32)
        throw CorruptData("'" + path + "' has a token header of unknown version " + std::to_string(version));
      if (count < 0 || size != kTokenHeaderBytes + static_cast<uint64_t>(count) * bytes_of(width)) {
        throw CorruptData("'" + path + "' has " + std::to_string(size) + " bytes, its header describes " +
                          std::to_string(count) + " tokens: it was cut short or changed. Mend: make it again");
      }
      return std::make_unique<FlatTokenFile>(path, std::move(file), kTokenHeaderBytes, count, width);
    }
  }
  if (size % 2 != 0)
    throw CorruptData(
        "'" + path +
        "' has no known header and an odd size, so it is no file of u16 tokens. Mend: make it with tokenize");
  return std::make_unique<FlatTokenFile>(path, std::move(file), 0, static_cast<int64_t>(size / 2), Width::kU16);
}

}  // namespace lockstep::data
