#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace lockstep::format {

/// CRC32C (Castagnoli; check value of "123456789" is e3069283): against accidents, not against people.
uint32_t crc32c(std::span<const std::byte> bytes);
uint32_t crc32c(const std::string& text);

/// Eight lower-case hex digits, so that a checksum's place can be reserved before it is known.
std::string hex8(uint32_t value);

/// XXH3-128 as 32 hex digits: names the content of a tensor, a file, a list.
std::string digest(std::span<const std::byte> bytes);
std::string digest(const std::string& text);

}  // namespace lockstep::format
