#include <algorithm>

#include <lockstep/base/error.h>
#include <lockstep/sharding/shard_layout.h>

namespace lockstep {

ShardLayout ShardLayout::replicated(std::string name, std::vector<int64_t> shape, std::string dtype, int world_size) {
  ShardLayout layout{std::move(name), std::move(shape), std::move(dtype), {}};
  layout.boxes.assign(world_size, Box::whole(layout.shape));
  return layout;
}

ShardLayout ShardLayout::sharded(std::string name, std::vector<int64_t> shape, std::string dtype, int dim,
                                 int world_size) {
  ShardLayout layout{std::move(name), std::move(shape), std::move(dtype), {}};
  const int64_t each = layout.shape[dim] / world_size, more = layout.shape[dim] % world_size;
  for (int rank = 0; rank < world_size; ++rank) {
    Box box = Box::whole(layout.shape);
    box.offsets[dim] = rank * each + std::min<int64_t>(rank, more);
    box.sizes[dim] = each + (rank < more ? 1 : 0);
    layout.boxes.push_back(std::move(box));
  }
  return layout;
}

void ShardLayout::check() const {
  std::vector<Box> distinct;
  int64_t covered = 0;
  for (const Box& box : boxes) {
    if (box.numel() == 0 || std::find(distinct.begin(), distinct.end(), box) != distinct.end()) continue;
    for (const Box& other : distinct) {
      LOCKSTEP_CHECK(intersection(box, other).numel() == 0) << name << ": two ranks hold overlapping boxes";
    }
    distinct.push_back(box);
    covered += box.numel();
  }
  LOCKSTEP_CHECK(covered == Box::whole(shape).numel())
      << name << ": the boxes hold " << covered << " of " << Box::whole(shape).numel() << " elements";
}

}  // namespace lockstep
