#include <algorithm>
#include <set>

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
  LOCKSTEP_CHECK(dim >= 0 && static_cast<size_t>(dim) < layout.shape.size() && world_size > 0)
      << layout.name << " has " << layout.shape.size() << " dims and cannot be cut along dim " << dim << " for "
      << world_size << " ranks";
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
  const std::set<Box> distinct(boxes.begin(), boxes.end());  // replicas count once
  LOCKSTEP_CHECK(tiles({distinct.begin(), distinct.end()}, shape))
      << name << ": the " << distinct.size() << " distinct boxes of " << boxes.size()
      << " ranks overlap, stick out or leave a gap";
}

}  // namespace lockstep
