#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>

#include <isa-l/crc.h>
#include <sodium.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <lockstep/format/checksum.h>

namespace lockstep::format {
namespace {

std::string hex32(XXH128_hash_t hash) {
  std::array<char, 33> text{};
  std::snprintf(text.data(), text.size(), "%016" PRIx64 "%016" PRIx64, hash.high64, hash.low64);
  return text.data();
}

}  // namespace

uint32_t crc32c(std::span<const std::byte> bytes, uint32_t before) {
  constexpr size_t kPiece = size_t{1} << 30;  // the library counts in int
  uint32_t state = ~before;
  while (!bytes.empty()) {
    const auto piece = bytes.first(std::min(bytes.size(), kPiece));
    // The library's signature lacks const; it only reads.
    auto* data = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(piece.data()));
    state = crc32_iscsi(data, static_cast<int>(piece.size()), state);
    bytes = bytes.subspan(piece.size());
  }
  return ~state;
}

uint32_t crc32c(const std::string& text) { return crc32c(std::as_bytes(std::span(text.data(), text.size()))); }

std::string hex8(uint32_t value) {
  std::array<char, 9> text{};
  std::snprintf(text.data(), text.size(), "%08" PRIx32, value);
  return text.data();
}

std::string digest(std::span<const std::byte> bytes) { return hex32(XXH3_128bits(bytes.data(), bytes.size())); }

std::string digest(const std::string& text) { return digest(std::as_bytes(std::span(text.data(), text.size()))); }

struct Digester::State {
  XXH3_state_t hash;
};

// XXH3's state asks for 64-byte alignment, which its own allocation function knows how to give.
Digester::Digester() : state_(reinterpret_cast<State*>(XXH3_createState())) {
  if (!state_) throw std::bad_alloc();
  XXH3_128bits_reset(&state_->hash);
}

void Digester::FreeState::operator()(State* state) const noexcept { XXH3_freeState(&state->hash); }

void Digester::add(std::span<const std::byte> bytes) { XXH3_128bits_update(&state_->hash, bytes.data(), bytes.size()); }

std::string Digester::hex() const { return hex32(XXH3_128bits_digest(&state_->hash)); }

struct Sha256::State {
  crypto_hash_sha256_state hash;
};

Sha256::Sha256() : state_(std::make_unique<State>()) { crypto_hash_sha256_init(&state_->hash); }

Sha256::~Sha256() = default;

void Sha256::add(std::span<const std::byte> bytes) {
  crypto_hash_sha256_update(&state_->hash, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
}

std::string Sha256::hex() {
  std::array<unsigned char, crypto_hash_sha256_BYTES> sum{};
  crypto_hash_sha256_final(&state_->hash, sum.data());
  std::array<char, 2 * sum.size() + 1> text{};
  return sodium_bin2hex(text.data(), text.size(), sum.data(), sum.size());
}

std::string sha256(const std::string& text) {
  Sha256 sum;
  sum.add(std::as_bytes(std::span(text.data(), text.size())));
  return sum.hex();
}

bool is_sha256(std::string_view text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

}  // namespace lockstep::format
