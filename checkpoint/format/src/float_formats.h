#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace lockstep::format {

/// IEEE 754 binary16 and the upper half of binary32: exact widening, rounding to nearest with ties to even. NaN stays
/// NaN, and one that fits keeps its bits.
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float value);

/// Whether widen() and narrow() know a dtype: F32, F16, BF16.
bool is_float_format(const std::string& dtype);
/// `from` holds `to.size()` elements of the dtype.
void widen(const std::string& dtype, std::span<const std::byte> from, std::span<float> to);
/// @return false when a finite value became infinite.
bool narrow(const std::string& dtype, std::span<const float> from, std::span<std::byte> to);

}  // namespace lockstep::format
