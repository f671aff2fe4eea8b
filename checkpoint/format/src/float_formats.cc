#include "float_formats.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace lockstep::format {
namespace {

constexpr uint32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;

template <float (*Convert)(uint16_t)>
void widen_each(std::span<const std::byte> from, std::span<float> to) {
  for (size_t i = 0; i < to.size(); ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, from.data() + 2 * i, sizeof(bits));
    to[i] = Convert(bits);
  }
}

template <uint16_t (*Convert)(float)>
bool narrow_each(std::span<const float> from, std::span<std::byte> to, uint16_t infinity) {
  bool fits = true;
  for (size_t i = 0; i < from.size(); ++i) {
    const uint16_t bits = Convert(from[i]);
    if ((bits & 0x7fff) == infinity && std::isfinite(from[i])) fits = false;
    std::memcpy(to.data() + 2 * i, &bits, sizeof(bits));
  }
  return fits;
}

}  // namespace

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits} << 16 & 0x80000000U, exponent = bits >> 10 & 31U, mantissa = bits & 1023U;
  if (exponent == 31) return std::bit_cast<float>(sign | kInfinity | mantissa << 13);
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), sign != 0 ? -1.0F : 1.0F);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t float_to_half(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000U, magnitude = bits & kMagnitude;
  constexpr uint32_t kLeastNormal = 0x38800000, kRoundsToInfinity = 0x477ff000;
  if (magnitude > kInfinity) {  // NaN: its low bits must not vanish into an infinity
    const uint32_t quiet = (magnitude & 0x1fff) != 0 ? 0x200U : 0U;
    return static_cast<uint16_t>(sign | 0x7c00U | (magnitude >> 13 & 0x3ffU) | quiet);
  }
  if (magnitude >= kRoundsToInfinity) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude < kLeastNormal)  // in units of 2^-24; 1024 of them are the least normal number's bits too
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::lrint(std::ldexp(std::fabs(value), 24))));
  const uint32_t rounded = magnitude - (112U << 23) + 0xfffU + (magnitude >> 13 & 1U);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

uint16_t float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if ((bits & kMagnitude) > kInfinity) return static_cast<uint16_t>(bits >> 16 | ((bits & 0xffff) != 0 ? 0x40U : 0U));
  return static_cast<uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

bool is_float_format(const std::string& dtype) { return dtype == "F32" || dtype == "F16" || dtype == "BF16"; }

void widen(const std::string& dtype, std::span<const std::byte> from, std::span<float> to) {
  if (dtype == "F16") return widen_each<half_to_float>(from, to);
  if (dtype == "BF16") return widen_each<bfloat16_to_float>(from, to);
  std::memcpy(to.data(), from.data(), to.size_bytes());
}

bool narrow(const std::string& dtype, std::span<const float> from, std::span<std::byte> to) {
  if (dtype == "F16") return narrow_each<float_to_half>(from, to, 0x7c00);
  if (dtype == "BF16") return narrow_each<float_to_bfloat16>(from, to, 0x7f80);
  std::memcpy(to.data(), from.data(), from.size_bytes());
  return true;
}

}  // namespace lockstep::format
