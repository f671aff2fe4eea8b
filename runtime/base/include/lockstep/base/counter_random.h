#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace lockstep {

/// Random numbers as a pure function of (key, counter): nothing to save, the same on any layout.
/// Source: Philox4x32-10, J. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC'11,
/// doi:10.1145/2063384.2063405.
std::array<uint32_t, 4> philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high);

/// A 64-bit key from a seed and a name, so that streams of different names are independent. FNV-1a, then splitmix64.
uint64_t stream_key(uint64_t seed, std::string_view name);
/// A 64-bit key from a seed and numbers, e.g. (step, micro-batch, layer).
uint64_t stream_key(uint64_t seed, uint64_t a, uint64_t b = 0, uint64_t c = 0);

/// Uniform in [0, 1) with 24 bits, and a standard normal (Box-Muller in double, rounded once), for element `index` of
/// the stream.
float uniform_at(uint64_t key, uint64_t index);
float normal_at(uint64_t key, uint64_t index);

}  // namespace lockstep
