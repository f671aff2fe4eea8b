// The oracle of gradient sums: every gradient is known in advance (the loss is a dot product), and the canonical tree
// over micro-batches is computed here by naive recursion.
#pragma once

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/sharding/gradient_sync.h>

#include "../support/same_bits.h"

namespace lockstep::test {

inline const std::vector<std::vector<int64_t>> kShapes = {{3}, {17, 5}, {1}, {0}, {31, 33}, {16}, {2, 3, 5}};

// The gradient that micro-batch `leaf` gives to parameter i. Magnitudes differ, so that the order of a sum shows.
inline at::Tensor leaf_gradient(int64_t leaf, size_t i) {
  at::Tensor values = at::empty(kShapes[i], at::kFloat);
  const uint64_t key = stream_key(3, static_cast<uint64_t>(leaf), i);
  for (int64_t k = 0; k < values.numel(); ++k) {
    values.data_ptr<float>()[k] = std::ldexp(normal_at(key, static_cast<uint64_t>(k)), static_cast<int>(leaf % 5) * 4);
  }
  return values;
}

// Leaves [begin, end) of the canonical tree: split at the largest power of two below the number of leaves.
inline at::Tensor tree_sum(int64_t begin, int64_t end, size_t i) {
  if (end - begin == 1) return leaf_gradient(begin, i);
  int64_t half = 1;
  while (2 * half < end - begin) half *= 2;
  return tree_sum(begin, begin + half, i) + tree_sum(begin + half, end, i);
}

struct Model {
  std::vector<at::Tensor> tensors;
  Model() {
    for (const auto& shape : kShapes) tensors.push_back(torch::zeros(shape, torch::requires_grad()));
  }
  std::vector<NamedParameter> named() const {
    std::vector<NamedParameter> named;
    for (size_t i = 0; i < tensors.size(); ++i) named.push_back({"layer" + std::to_string(i) + ".weight", tensors[i]});
    return named;
  }
  // Forward and backward of one micro-batch, through the parameters that `uses` picks.
  void backward(
      int64_t leaf, const std::function<bool(size_t)>& uses = [](size_t) { return true; }) const {
    at::Tensor loss = torch::zeros({});
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (uses(i)) loss = loss + (tensors[i] * leaf_gradient(leaf, i)).sum();
    }
    loss.backward();
  }
};

}  // namespace lockstep::test
