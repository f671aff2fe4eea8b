#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <lockstep/format/box.h>

namespace lockstep {

/// Where one tensor lives: its name, global shape, dtype, and which box of it each rank of the world holds.
///
/// Gradient reduction, norm, optimizer, checkpoint, reshard and replica check all read this one declaration.
struct ShardLayout {
  std::string name;            ///< fully qualified, e.g. "blocks.3.attention.query.weight"
  std::vector<int64_t> shape;  ///< global
  std::string dtype;           ///< safetensors name: "F32", "BF16", ...
  std::vector<Box> boxes;      ///< by rank of the world; equal boxes are replicas, an empty one (numel 0) holds nothing

  static ShardLayout replicated(std::string name, std::vector<int64_t> shape, std::string dtype, int world_size);
  /// Cut along `dim`, sizes differing by at most one, over `world_size` ranks.
  static ShardLayout sharded(std::string name, std::vector<int64_t> shape, std::string dtype, int dim, int world_size);

  /// @throws CheckFailed unless the distinct boxes are disjoint and fill the tensor.
  void check() const;
};

}  // namespace lockstep
