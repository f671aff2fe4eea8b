// Boxes of a small tensor, lawful or not, against counting its cells: what tiles() says, what a manifest with them is
// taken for, and what a reader makes of a checkpoint cut like that. Bytes are read as rank, sizes, cuts, spoilings and
// the box wanted.
#include <algorithm>

#include <lockstep/base/error.h>
#include <lockstep/format/reader.h>
#include <lockstep/format/writer.h>

#include "fuzz_target.h"
#include "memory_fs.h"

namespace lockstep::format {
namespace {

class Feed {  // zeros when it is empty
 public:
  Feed(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  int64_t below(int64_t limit) { return limit <= 0 ? 0 : next() % limit; }
  int64_t next() { return at_ < size_ ? data_[at_++] : 0; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// Steps through the cells of a shape in row-major order.
bool advance(std::vector<int64_t>& cell, const std::vector<int64_t>& shape) {
  for (size_t d = shape.size(); d-- > 0; cell[d] = 0) {
    if (++cell[d] < shape[d]) return true;
  }
  return false;
}

bool is_in(const std::vector<int64_t>& cell, const Box& box) {
  for (size_t d = 0; d < cell.size(); ++d) {
    if (cell[d] < box.offsets[d] || cell[d] >= box.offsets[d] + box.sizes[d]) return false;
  }
  return true;
}

bool fits(const Box& box, const std::vector<int64_t>& shape) {
  if (box.offsets.size() != shape.size() || box.sizes.size() != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (box.offsets[d] < 0 || box.sizes[d] < 0 || box.offsets[d] + box.sizes[d] > shape[d]) return false;
  }
  return true;
}

// The oracle: every cell lies in exactly one box, and no box sticks out.
bool covers_each_cell_once(const std::vector<Box>& boxes, const std::vector<int64_t>& shape) {
  for (const Box& box : boxes) {
    if (!fits(box, shape)) return false;
  }
  if (Box::whole(shape).numel() == 0) return true;
  std::vector<int64_t> cell(shape.size(), 0);
  do {
    if (std::count_if(boxes.begin(), boxes.end(), [&](const Box& box) { return is_in(cell, box); }) != 1) return false;
  } while (advance(cell, shape));
  return true;
}

std::vector<Box> make_boxes(Feed& feed, const std::vector<int64_t>& shape) {
  std::vector<Box> boxes = {Box::whole(shape)};
  for (int64_t cuts = feed.below(8); cuts > 0 && !shape.empty(); --cuts) {
    Box& box = boxes[static_cast<size_t>(feed.below(static_cast<int64_t>(boxes.size())))];
    const auto d = static_cast<size_t>(feed.below(static_cast<int64_t>(shape.size())));
    Box rest = box;
    const int64_t at = feed.below(box.sizes[d] + 1);
    rest.offsets[d] += at;
    rest.sizes[d] -= at;
    box.sizes[d] = at;
    boxes.push_back(rest);
  }
  for (int64_t spoilings = feed.below(4); spoilings > 0; --spoilings) {
    const auto i = static_cast<size_t>(feed.below(static_cast<int64_t>(boxes.size())));
    const auto d = static_cast<size_t>(feed.below(static_cast<int64_t>(shape.size())));
    switch (feed.below(5)) {
      case 0:
        if (!shape.empty()) boxes[i].offsets[d] = feed.below(8) - 1;
        break;
      case 1:
        if (!shape.empty()) boxes[i].sizes[d] = feed.below(8) - 1;
        break;
      case 2:
        boxes.push_back(boxes[i]);
        break;
      case 3:
        boxes.erase(boxes.begin() + static_cast<int64_t>(i));
        if (boxes.empty()) return boxes;
        break;
      default:
        boxes[i].sizes.push_back(1);
    }
  }
  return boxes;
}

Manifest manifest_of(const std::vector<Box>& boxes, const std::vector<int64_t>& shape) {
  Manifest manifest;
  StoredTensor& tensor = manifest.tensors["w"] = {"U8", shape, {}};
  for (size_t i = 0; i < boxes.size(); ++i) {
    manifest.files.push_back({"s" + std::to_string(i), 0, 0});
    tensor.boxes.push_back({boxes[i], i});
  }
  return manifest;
}

bool is_accepted(const Manifest& manifest) {
  try {
    parse_manifest(encode_manifest(manifest), "MANIFEST");
    return true;
  } catch (const CheckFailed&) {  // encoding reads what it wrote
    return false;
  }
}

// The value of a cell, a function of where it lies in the whole tensor.
std::vector<std::byte> cut(const Box& box, const std::vector<int64_t>& shape) {
  std::vector<std::byte> bytes;
  std::vector<int64_t> cell(shape.size(), 0);
  if (box.numel() == 0) return bytes;
  uint8_t value = 0;
  do {
    if (is_in(cell, box)) bytes.push_back(static_cast<std::byte>(value));
    value = static_cast<uint8_t>(value + 7);
  } while (advance(cell, shape));
  return bytes;
}

void check_reader(const std::vector<Box>& boxes, const std::vector<int64_t>& shape, const Box& wanted) {
  MemoryFs fs;
  Manifest manifest = manifest_of(boxes, shape);
  for (size_t i = 0; i < boxes.size(); ++i) {
    const std::vector<std::byte> bytes = cut(boxes[i], shape);
    write_shard(fs, "c/s" + std::to_string(i), {{"w", "U8", boxes[i], bytes}});
    manifest.files[i] = describe_shard(fs, "c", "s" + std::to_string(i));
  }
  fs.files["c/MANIFEST"] = encode_manifest(manifest);
  const Reader reader(fs, "c");
  std::vector<std::byte> got(static_cast<size_t>(wanted.numel()), std::byte{0xee});
  reader.read("w", wanted, got);
  FUZZ_CHECK(got == cut(wanted, shape));
}

}  // namespace
}  // namespace lockstep::format

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep;
  format::Feed feed(data, size);
  std::vector<int64_t> shape(static_cast<size_t>(feed.below(5)));
  for (int64_t& extent : shape) extent = feed.below(6);
  const std::vector<Box> boxes = format::make_boxes(feed, shape);
  const bool is_tiling = format::covers_each_cell_once(boxes, shape);
  FUZZ_CHECK(tiles(boxes, shape) == is_tiling);
  FUZZ_CHECK(format::is_accepted(format::manifest_of(boxes, shape)) == is_tiling);
  if (!is_tiling) return 0;
  Box wanted = Box::whole(shape);
  for (size_t d = 0; d < shape.size(); ++d) {
    wanted.offsets[d] = feed.below(shape[d] + 1);
    wanted.sizes[d] = feed.below(shape[d] - wanted.offsets[d] + 1);
  }
  format::check_reader(boxes, shape, wanted);
  return 0;
}
