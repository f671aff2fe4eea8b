#include <cinttypes>
#include <cstdio>

#include <isa-l/crc.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <lockstep/format/checksum.h>

namespace lockstep::format {

uint32_t crc32c(std::span<const std::byte> bytes) {
  constexpr size_t kPiece = size_t{1} << 30;  // the library counts in int
  uint32_t state = 0xffffffffu;
  while (!bytes.empty()) {
    const auto piece = bytes.first(std::min(bytes.size(), kPiece));
    state = crc32_iscsi(reinterpret_cast<unsigned char*>(const_cast<std::byte*>(piece.data())),
                        static_cast<int>(piece.size()), state);
    bytes = bytes.subspan(piece.size());
  }
  return ~state;
}

uint32_t crc32c(const std::string& text) { return crc32c(std::as_bytes(std::span(text.data(), text.size()))); }

std::string hex8(uint32_t value) {
  char text[9];
  std::snprintf(text, sizeof(text), "%08" PRIx32, value);
  return text;
}

std::string digest(std::span<const std::byte> bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  char hex[33];
  std::snprintf(hex, sizeof(hex), "%016" PRIx64 "%016" PRIx64, hash.high64, hash.low64);
  return hex;
}

std::string digest(const std::string& text) { return digest(std::as_bytes(std::span(text.data(), text.size()))); }

}  // namespace lockstep::format
