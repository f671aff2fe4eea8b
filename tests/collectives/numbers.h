#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace lockstep {

inline constexpr std::initializer_list<at::ScalarType> kDtypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf,
                                                                  at::kInt,   at::kLong,   at::kByte};

/// 0, 1, around the number of ranks, odd, and many, each once.
inline std::vector<int64_t> sizes_for(int ranks, int64_t many) {
  std::vector<int64_t> sizes{0, 1, ranks - 1, ranks, 13, many};
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  return sizes;
}

/// A tensor made element by element from whole numbers.
inline at::Tensor made(int64_t numel, at::ScalarType dtype, const std::function<int64_t(int64_t)>& element) {
  at::Tensor whole = at::empty({numel}, at::kLong);
  auto* data = whole.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < numel; ++i) data[i] = element(i);
  return whole.to(dtype);
}

/// What rank `rank` brings, at most `below`: exact in every dtype up to 256, other on each rank and place.
inline int64_t brought(int rank, int64_t i, int64_t below = 251) { return (i * 7 + rank * 37 + i / below) % below; }

/// At most 30, so that the sum over 8 ranks is exact in every dtype.
inline int64_t term(int rank, int64_t i) { return brought(rank, i, 31); }

/// "" when equal, else which element differs first, and how many.
inline std::string difference(const at::Tensor& got, const at::Tensor& wanted) {
  if (got.scalar_type() != wanted.scalar_type() || got.numel() != wanted.numel()) return "another dtype or size";
  const at::Tensor a = got.reshape({-1}).to(at::kDouble), b = wanted.reshape({-1}).to(at::kDouble);
  int64_t first = -1, count = 0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    if (a.const_data_ptr<double>()[i] == b.const_data_ptr<double>()[i]) continue;
    if (count++ == 0) first = i;
  }
  if (count == 0) return "";
  return "element " + std::to_string(first) + " is " + std::to_string(a.const_data_ptr<double>()[first]) + ", not " +
         std::to_string(b.const_data_ptr<double>()[first]) + " (" + std::to_string(count) + " of " +
         std::to_string(a.numel()) + " differ)";
}

}  // namespace lockstep
