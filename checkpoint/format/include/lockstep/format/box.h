#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <vector>

namespace lockstep {

/// A box inside a tensor: per dim an offset and a size, both >= 0 and of the tensor's rank. A scalar has no dims and
/// one element. The lowest layer that needs boxes owns them, so files (format) and placement (sharding) speak of the
/// same thing.
struct Box {
  std::vector<int64_t> offsets;
  std::vector<int64_t> sizes;

  int64_t numel() const;
  static Box whole(const std::vector<int64_t>& shape);
  friend auto operator<=>(const Box&, const Box&) = default;
};

/// What two boxes of one tensor share; numel() is 0 when they are apart.
Box intersection(const Box& a, const Box& b);

/// Whether the boxes are disjoint and together fill a tensor of this shape. Empty boxes fill nothing and are welcome.
///
/// Cost: n 2^d log(n 2^d) for n boxes cut along d dims, so that a hostile list of a million boxes costs no n^2; 30 MB
/// at most. @return false too when n d 2^d passes 2^21 (a quarter of a million boxes cut along two dims): no sane
/// layout does.
bool tiles(const std::vector<Box>& boxes, const std::vector<int64_t>& shape);
bool point_to_tiles(const std::vector<const Box*>& boxes, const std::vector<int64_t>& shape);

/// Calls `run(offset in from, offset in to, elements)` for each stretch of `part` (in tensor coordinates, inside both
/// boxes) that is contiguous in the row-major memory of box `from` and of box `to`; offsets in elements, rising in
/// both.
void for_each_run(const Box& part, const Box& from, const Box& to,
                  const std::function<void(int64_t, int64_t, int64_t)>& run);

}  // namespace lockstep
