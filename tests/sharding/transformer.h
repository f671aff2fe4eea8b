#pragma once

#include <vector>

#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>
#include <lockstep/sharding/recompute.h>

#include "../support/same_bits.h"

namespace lockstep {

inline at::Tensor normal(at::IntArrayRef sizes, uint64_t key) {
  const at::Tensor x = at::empty(sizes, at::kFloat);
  for (int64_t i = 0; i < x.numel(); ++i) x.mutable_data_ptr<float>()[i] = normal_at(key, static_cast<uint64_t>(i));
  return x;
}

struct BlockSizes {
  int64_t width = 32, heads = 4, length = 12;
  double dropout = 0.1;
};

/// x + attention(norm(x)), then x + mlp(norm(x)), of all that nn has: GPT-2's parts or Llama's.
class Block {
 public:
  Block(BlockSizes sizes, bool is_llama, uint64_t number) : sizes_(sizes), is_llama_(is_llama), number_(number) {
    const int64_t width = sizes.width, hidden = 4 * width;
    for (const auto& shape : std::vector<std::vector<int64_t>>{{width},
                                                               {width},
                                                               {width},
                                                               {width},
                                                               {3 * width, width},
                                                               {width, width},
                                                               {hidden, width},
                                                               {hidden, width},
                                                               {width, hidden},
                                                               {3 * width},
                                                               {width}}) {
      const auto key = stream_key(17, number, parameters.size());
      parameters.push_back((normal(shape, key) * 0.1).requires_grad_());
    }
    std::tie(cosines_, sines_) = nn::rope_tables(sizes.length, width / sizes.heads, 10000);
  }

  at::Tensor forward(const at::Tensor& x_in) const {
    const at::Tensor x = x_in + drop(attend(norm(0, x_in)), 0);
    return x + drop(feed_forward(norm(2, x)), 1);
  }

  std::vector<at::Tensor> parameters;  // norms' weights and biases, then products'

 private:
  at::Tensor norm(size_t at, const at::Tensor& x) const {
    return is_llama_ ? nn::rms_norm(x, parameters[at], 1e-5)
                     : nn::layer_norm(x, parameters[at], parameters[at + 1], 1e-5);
  }
  at::Tensor drop(const at::Tensor& x, uint64_t place) const {
    return nn::dropout(x, sizes_.dropout, /*training=*/true, 2 * number_ + place);
  }
  at::Tensor attend(const at::Tensor& x) const {
    const auto parts = nn::linear(x, parameters[4], is_llama_ ? at::Tensor() : parameters[9])
                           .view({x.size(0), x.size(1), 3, sizes_.heads, sizes_.width / sizes_.heads})
                           .unbind(2);
    at::Tensor q = parts[0], k = parts[1];
    if (is_llama_) q = nn::rope(q, cosines_, sines_), k = nn::rope(k, cosines_, sines_);
    return nn::linear(nn::attention(q, k, parts[2], /*causal=*/true), parameters[5],
                      is_llama_ ? at::Tensor() : parameters[10]);
  }
  at::Tensor feed_forward(const at::Tensor& x) const {
    const at::Tensor up = nn::linear(x, parameters[6], {});
    const at::Tensor hidden = is_llama_ ? nn::swiglu(nn::linear(x, parameters[7], {}), up) : nn::gelu(up);
    return nn::linear(hidden, parameters[8], {});
  }

  BlockSizes sizes_;
  bool is_llama_;
  uint64_t number_;
  at::Tensor cosines_, sines_;
};

class Stack {
 public:
  Stack(int64_t layers, BlockSizes sizes, bool is_llama) {
    for (int64_t i = 0; i < layers; ++i) blocks.emplace_back(sizes, is_llama, static_cast<uint64_t>(i));
  }
  at::Tensor forward(at::Tensor x, Recompute how, const RecomputeHooks& hooks = {}) const {
    for (const auto& block : blocks)
      x = recompute(
          how, [&block, x] { return block.forward(x); }, hooks);
    return x;
  }
  std::vector<at::Tensor> take_gradients() {
    std::vector<at::Tensor> gradients;
    for (auto& block : blocks) {
      for (auto& parameter : block.parameters) {
        gradients.push_back(std::exchange(parameter.mutable_grad(), at::Tensor()));
      }
    }
    return gradients;
  }

  std::vector<Block> blocks;
};

/// How many of two lists' tensors differ, undefined ones being alike.
inline int num_different(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  int count = a.size() != b.size();
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    count += !same_bits(a[i], b[i]);
  }
  return count;
}

}  // namespace lockstep
