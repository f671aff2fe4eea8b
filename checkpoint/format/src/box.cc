#include <algorithm>
#include <map>
#include <numeric>

#include <lockstep/format/box.h>

namespace lockstep {
namespace {

constexpr size_t kMaxCorners = size_t{1} << 20;  // some 100 MB; a made-up manifest gets no further

bool is_inside(const Box& box, const std::vector<int64_t>& shape) {
  if (box.offsets.size() != shape.size() || box.sizes.size() != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (box.offsets[d] < 0 || box.sizes[d] < 0 || box.sizes[d] > shape[d] || box.offsets[d] > shape[d] - box.sizes[d])
      return false;
  }
  return true;
}

// Adds the signed corners of a box: what is left of its indicator function after one derivative along each cut dim.
void add_corners(const Box& box, const std::vector<size_t>& cut_dims, int64_t sign,
                 std::map<std::vector<int64_t>, int64_t>& corners) {
  std::vector<int64_t> corner(cut_dims.size());
  for (size_t bits = 0; bits < size_t{1} << cut_dims.size(); ++bits) {
    int64_t parity = sign;
    for (size_t i = 0; i < cut_dims.size(); ++i) {
      const size_t d = cut_dims[i];
      const bool far = (bits >> i & 1) != 0;
      corner[i] = box.offsets[d] + (far ? box.sizes[d] : 0);
      if (far) parity = -parity;
    }
    const auto place = corners.try_emplace(corner, 0).first;
    place->second += parity;
    if (place->second == 0) corners.erase(place);
  }
}

}  // namespace

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

// Boxes tile the whole exactly when their indicator functions sum to the whole's, which is when the derivatives along
// all dims agree; those are signed points at the corners. Dims that no box cuts contribute the same factor to all.
bool tiles(const std::vector<Box>& boxes, const std::vector<int64_t>& shape) {
  const Box whole = Box::whole(shape);
  std::vector<const Box*> filled;
  for (const Box& box : boxes) {
    if (!is_inside(box, shape)) return false;
    if (box.numel() > 0) filled.push_back(&box);
  }
  if (whole.numel() == 0 || filled.empty()) return whole.numel() == 0 && filled.empty();
  std::vector<size_t> cut_dims;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (std::any_of(filled.begin(), filled.end(), [&](const Box* box) { return box->sizes[d] != shape[d]; }))
      cut_dims.push_back(d);
  }
  if (filled.size() > kMaxCorners >> cut_dims.size()) return false;
  std::map<std::vector<int64_t>, int64_t> corners;
  add_corners(whole, cut_dims, -1, corners);
  for (const Box* box : filled) add_corners(*box, cut_dims, +1, corners);
  return corners.empty();
}

void for_each_run(const Box& part, const Box& from, const Box& to,
                  const std::function<void(int64_t, int64_t, int64_t)>& run) {
  if (part.numel() == 0) return;
  // Trailing dims that are whole in both boxes belong to one run, and so does the first dim before them.
  size_t run_dims = part.sizes.size();
  int64_t run_elements = 1;
  while (run_dims > 0) {
    const size_t d = --run_dims;
    run_elements *= part.sizes[d];
    if (from.sizes[d] != part.sizes[d] || to.sizes[d] != part.sizes[d]) break;
  }
  std::vector<int64_t> index(part.sizes.size(), 0);
  const auto start_in = [&](const Box& box) {
    int64_t start = 0;
    for (size_t d = 0; d < index.size(); ++d)
      start = start * box.sizes[d] + (part.offsets[d] - box.offsets[d] + index[d]);
    return start;
  };
  for (;;) {
    run(start_in(from), start_in(to), run_elements);
    size_t d = run_dims;
    while (d > 0 && ++index[d - 1] == part.sizes[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

}  // namespace lockstep
