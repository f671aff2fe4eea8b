#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <numeric>

#include <lockstep/format/box.h>

namespace lockstep {

int64_t Box::numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>()); }

Box Box::whole(const std::vector<int64_t>& shape) { return {std::vector<int64_t>(shape.size(), 0), shape}; }

Box intersection(const Box& a, const Box& b) {
  Box both = a;
  for (size_t d = 0; d < a.sizes.size(); ++d) {
    both.offsets[d] = std::max(a.offsets[d], b.offsets[d]);
    const int64_t end = std::min(a.offsets[d] + a.sizes[d], b.offsets[d] + b.sizes[d]);
    both.sizes[d] = std::max<int64_t>(0, end - both.offsets[d]);
  }
  return both;
}

void copy_box(const Box& part, const Box& from, const std::byte* source, const Box& to, std::byte* target,
              int64_t item_bytes) {
  const size_t dims = part.sizes.size();
  if (part.numel() == 0) return;
  if (dims == 0) {
    std::memcpy(target, source, static_cast<size_t>(item_bytes));
    return;
  }
  const auto start_in = [&](const Box& box, const std::vector<int64_t>& index) {
    int64_t start = 0;
    for (size_t d = 0; d < dims; ++d) start = start * box.sizes[d] + (part.offsets[d] - box.offsets[d] + index[d]);
    return start * item_bytes;
  };
  const auto row_bytes = static_cast<size_t>(part.sizes[dims - 1] * item_bytes);  // the last dim lies in one piece
  std::vector<int64_t> index(dims, 0);
  for (;;) {
    std::memcpy(target + start_in(to, index), source + start_in(from, index), row_bytes);
    size_t d = dims - 1;
    while (d > 0 && ++index[d - 1] == part.sizes[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

}  // namespace lockstep
