#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace lockstep::format {

/// CRC32C (Castagnoli; check value of "123456789" is e3069283): against accidents, not against people.
/// Cost: ISA-L's folding code, several GB/s a core. Source: RFC 3720, appendix B.4.
/// @param before the checksum of what comes before `bytes`: pieces in a row give the checksum of all.
uint32_t crc32c(std::span<const std::byte> bytes, uint32_t before = 0);
uint32_t crc32c(const std::string& text);

/// Eight lower-case hex digits, so that a checksum's place can be reserved before it is known.
std::string hex8(uint32_t value);

/// XXH3-128 as 32 hex digits (canonical form: high half first): names the content of a tensor, a file, a list.
/// Against accidents too: an adversary can find two contents of one digest.
std::string digest(std::span<const std::byte> bytes);
std::string digest(const std::string& text);

/// The same digest, fed piece by piece.
class Digester {
 public:
  Digester();
  void add(std::span<const std::byte> bytes);
  std::string hex() const;

 private:
  struct State;
  struct FreeState {
    void operator()(State* state) const noexcept;
  };
  std::unique_ptr<State, FreeState> state_;
};

/// SHA-256, fed piece by piece: against people too. Cost: 0.3 GB/s a core (libsodium), a tenth of the others.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  void add(std::span<const std::byte> bytes);
  std::string hex();  ///< 64 hex digits, once

 private:
  struct State;
  std::unique_ptr<State> state_;
};
std::string sha256(const std::string& text);
bool is_sha256(std::string_view text);  ///< 64 lower-case hex digits

}  // namespace lockstep::format
