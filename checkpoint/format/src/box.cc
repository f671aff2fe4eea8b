#include <algorithm>
#include <numeric>
#include <span>

#include <lockstep/format/box.h>

namespace lockstep {
namespace {

constexpr size_t kMaxCornerNumbers = size_t{1} << 21;  // 16 MiB; a made-up manifest gets no further

bool is_inside(const Box& box, const std::vector<int64_t>& shape) {
  if (box.offsets.size() != shape.size() || box.sizes.size() != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (box.offsets[d] < 0 || box.sizes[d] < 0 || box.sizes[d] > shape[d] || box.offsets[d] > shape[d] - box.sizes[d])
      return false;
  }
  return true;
}

// Signed points, `num_dims` coordinates each, one after another.
struct Corners {
  size_t num_dims = 0;
  std::vector<int64_t> coordinates;
  std::vector<int8_t> signs;
  std::span<const int64_t> operator[](size_t i) const { return std::span(coordinates).subspan(i * num_dims, num_dims); }
};

// Adds the signed corners of a box: what is left of its indicator function after one derivative along each cut dim.
void add_corners(const Box& box, const std::vector<size_t>& cut_dims, int8_t sign, Corners& corners) {
  for (size_t bits = 0; bits < size_t{1} << cut_dims.size(); ++bits) {
    int8_t parity = sign;
    for (size_t i = 0; i < cut_dims.size(); ++i) {
      const size_t d = cut_dims[i];
      const bool far = (bits >> i & 1) != 0;
      corners.coordinates.push_back(box.offsets[d] + (far ? box.sizes[d] : 0));
      if (far) parity = static_cast<int8_t>(-parity);
    }
    corners.signs.push_back(parity);
  }
}

// Whether the signs at each point sum to nothing.
bool cancel(const Corners& corners) {
  std::vector<uint32_t> order(corners.signs.size());
  std::iota(order.begin(), order.end(), 0U);
  const auto compare = [&](uint32_t a, uint32_t b) {
    return std::ranges::lexicographical_compare(corners[a], corners[b]);
  };
  std::sort(order.begin(), order.end(), compare);
  int64_t sum = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    if (i > 0 && compare(order[i - 1], order[i])) {
      if (sum != 0) return false;
    }
    sum += corners.signs[order[i]];
  }
  return sum == 0;
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
bool point_to_tiles(const std::vector<const Box*>& boxes, const std::vector<int64_t>& shape) {
  const Box whole = Box::whole(shape);
  const auto is_filled = [](const Box* box) { return box->numel() > 0; };
  if (!std::all_of(boxes.begin(), boxes.end(), [&](const Box* box) { return is_inside(*box, shape); })) return false;
  const auto num_filled = static_cast<size_t>(std::count_if(boxes.begin(), boxes.end(), is_filled));
  if (whole.numel() == 0 || num_filled == 0) return whole.numel() == 0 && num_filled == 0;
  std::vector<size_t> cut_dims;
  for (size_t d = 0; d < shape.size(); ++d) {
    const auto is_cut = [&](const Box* box) { return is_filled(box) && box->sizes[d] != shape[d]; };
    if (std::any_of(boxes.begin(), boxes.end(), is_cut)) cut_dims.push_back(d);
  }
  const size_t num_dims = std::max<size_t>(cut_dims.size(), 1);
  if (num_filled + 1 > (kMaxCornerNumbers / num_dims) >> cut_dims.size()) return false;
  Corners corners{.num_dims = cut_dims.size()};
  corners.coordinates.reserve((num_filled + 1) * cut_dims.size() << cut_dims.size());
  corners.signs.reserve((num_filled + 1) << cut_dims.size());
  add_corners(whole, cut_dims, -1, corners);
  for (const Box* box : boxes) {
    if (is_filled(box)) add_corners(*box, cut_dims, +1, corners);
  }
  return cancel(corners);
}

bool tiles(const std::vector<Box>& boxes, const std::vector<int64_t>& shape) {
  std::vector<const Box*> pointers;
  pointers.reserve(boxes.size());
  for (const Box& box : boxes) pointers.push_back(&box);
  return point_to_tiles(pointers, shape);
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
