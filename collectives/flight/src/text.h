#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

namespace lockstep::flight {

// Texts of a ring: as much of them as there is room for, and a zero.
template <size_t N>
void set_text(std::array<char, N>& to, std::string_view text) noexcept {
  const size_t size = std::min(text.size(), N - 1);
  std::memcpy(to.data(), text.data(), size);
  to[size] = '\0';
}

template <size_t N>
std::string text_of(const std::array<char, N>& text) {
  return {text.data(), strnlen(text.data(), N)};
}

}  // namespace lockstep::flight
