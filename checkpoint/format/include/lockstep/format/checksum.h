#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

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

}  // namespace lockstep::format
