#pragma once

#include <cstdint>
#include <vector>

namespace lockstep {

/// A box inside a tensor: per dim an offset and a size. A scalar has no dims and one element.
struct Box {
  std::vector<int64_t> offsets;
  std::vector<int64_t> sizes;

  int64_t numel() const;
  static Box whole(const std::vector<int64_t>& shape);
  friend bool operator==(const Box&, const Box&) = default;
};

/// What two boxes of one tensor share; numel() is 0 when they are apart.
Box intersection(const Box& a, const Box& b);

/// Copies `part` (in tensor coordinates, inside both boxes) from memory laid out as box `from` to memory laid out as
/// box `to`.
void copy_box(const Box& part, const Box& from, const std::byte* source, const Box& to, std::byte* target,
              int64_t item_bytes);

}  // namespace lockstep
