#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace lockstep {

/// Which layers of a stack go to which part. Parts: the pieces of a pipeline in model order (positions,
/// pipeline_schedule.h). A split is the number of layers of each part, in order: {3, 4, 4, 1}.
using LayerSplit = std::vector<int64_t>;

struct LayerRange {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};
LayerRange layers_of_part(const LayerSplit& split, int part);

/// The split whose dearest part is cheapest; among those the most even one (least sum of squares), then the one with
/// more layers in front. No part is empty. Cost: O(layers^2 x parts).
/// @param costs of each layer, e.g. measured seconds; >= 0 and finite.
/// @throws ConfigError fewer layers than parts.
LayerSplit split_layers(std::span<const double> costs, int num_parts);

/// A split written by a person: "3,4,4,1"; 0 makes a part that passes its input on.
/// @throws ConfigError not numbers, not num_parts of them, or not num_layers in sum; says a split that would do.
LayerSplit parse_layer_split(const std::string& text, int64_t num_layers, int num_parts);

}  // namespace lockstep
