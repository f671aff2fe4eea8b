// Stacks of layers, run whole or cut, with a record of all that must not depend on the cut.
#pragma once

#include <cmath>
#include <functional>
#include <map>

#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/layer_split.h>
#include <lockstep/sharding/pipeline_runner.h>

#include "../support/same_bits.h"

namespace lockstep::test {

inline at::Tensor random_tensor(at::IntArrayRef sizes, uint64_t key, float scale = 0.3f) {
  at::Tensor tensor = at::empty(sizes, at::kFloat);
  for (int64_t i = 0; i < tensor.numel(); ++i)
    tensor.data_ptr<float>()[i] = scale * normal_at(stream_key(5, key, 0), static_cast<uint64_t>(i));
  return tensor;
}

struct Layer {
  std::vector<at::Tensor> parameters;
  std::function<at::Tensor(at::Tensor x, int64_t micro_batch)> forward;
};

struct StackModel {
  std::vector<Layer> layers;
  std::function<at::Tensor(int64_t micro_batch)> batch;  // input of the first layer
  bool bf16 = false;

  Layer& add(const std::vector<std::vector<int64_t>>& shapes) {
    layers.emplace_back();
    for (const auto& shape : shapes) {
      const uint64_t key = 100 * layers.size() + layers.back().parameters.size();
      layers.back().parameters.push_back(random_tensor(shape, key).requires_grad_());
    }
    return layers.back();
  }
};

// Token ids, embedding, five blocks with dropout, head and loss.
inline StackModel gpt(bool bf16) {
  constexpr int64_t kVocab = 11, kLength = 4, kDim = 8, kHeads = 2;
  StackModel model;
  model.bf16 = bf16;
  const auto ids = [](int64_t micro_batch, int64_t shift) {
    at::Tensor tokens = at::empty({2, kLength}, at::kLong);
    for (int64_t i = 0; i < tokens.numel(); ++i)
      tokens.data_ptr<int64_t>()[i] = (7 * micro_batch + 3 * i + shift * (i + 2) + micro_batch * i) % kVocab;
    return tokens;
  };
  model.batch = [=](int64_t micro_batch) { return ids(micro_batch, 0); };
  Layer& embedding = model.add({{kVocab, kDim}});
  embedding.forward = [p = embedding.parameters](const at::Tensor& x, int64_t) { return at::embedding(p[0], x); };
  for (uint64_t i = 0; i < 5; ++i) {
    Layer& block = model.add(
        {{kDim}, {kDim}, {3 * kDim, kDim}, {3 * kDim}, {kDim, kDim}, {kDim}, {4 * kDim, kDim}, {kDim, 4 * kDim}});
    block.forward = [p = block.parameters, i](const at::Tensor& x, int64_t) {
      const auto qkv =
          nn::linear(nn::layer_norm(x, p[0], p[1], 1e-5), p[2], p[3]).view({2, kLength, 3, kHeads, kDim / kHeads});
      const at::Tensor mixed = nn::attention(qkv.select(2, 0), qkv.select(2, 1), qkv.select(2, 2), /*causal=*/true);
      const at::Tensor y = x + nn::dropout(nn::linear(mixed, p[4], p[5]), 0.2, /*training=*/true, 2 * i);
      return y + nn::dropout(nn::linear(nn::gelu(nn::linear(y, p[6], {})), p[7], {}), 0.2, true, 2 * i + 1);
    };
  }
  Layer& head = model.add({{kDim}, {kDim}, {kVocab, kDim}});
  head.forward = [p = head.parameters, ids](const at::Tensor& x, int64_t micro_batch) {
    const at::Tensor rows = nn::layer_norm(x, p[0], p[1], 1e-5).view({-1, kDim});
    return nn::linear_cross_entropy_sum(rows, p[2], ids(micro_batch, 1).view({-1}));
  };
  return model;
}

// Images in channels-last order; activations changed in place.
inline StackModel convolutions() {
  StackModel model;
  model.batch = [](int64_t micro_batch) {
    return random_tensor({2, 16, 6, 6}, 1000 + micro_batch, 1).contiguous(at::MemoryFormat::ChannelsLast);
  };
  for (int i = 0; i < 4; ++i) {
    Layer& layer = model.add({{16, 16, 3, 3}, {16}, {16}});
    layer.forward = [p = layer.parameters](const at::Tensor& x, int64_t) {
      return at::group_norm(at::conv2d(x, p[0], {}, 1, 1), 4, p[1], p[2]).relu_() + x;
    };
  }
  model.add({}).forward = [](at::Tensor x, int64_t) { return x.mul_(0.5); };  // what arrived, changed in place
  Layer& head = model.add({{3, 16}});
  head.forward = [p = head.parameters](const at::Tensor& x, int64_t) {
    return at::cross_entropy_loss(nn::linear(x.mean({2, 3}), p[0], {}), torch::tensor({0, 2}), {}, at::Reduction::Sum);
  };
  return model;
}

// Boundaries that are views with strides of every kind, and gradients too.
inline StackModel odd_layouts() {
  StackModel model;
  model.batch = [](int64_t micro_batch) { return random_tensor({3, 4, 5}, 2000 + micro_batch, 1); };
  const auto times = [&](const std::vector<int64_t>& shape) {
    Layer& layer = model.add({shape});
    layer.forward = [p = layer.parameters](const at::Tensor& x, int64_t) { return x * p[0]; };
  };
  const auto view = [&](const std::function<at::Tensor(const at::Tensor&)>& of) {
    model.add({}).forward = [of](const at::Tensor& x, int64_t) { return of(x); };
  };
  times({3, 4, 5});
  view([](const at::Tensor& x) { return x.transpose(0, 2); });
  view([](const at::Tensor& x) { return x.narrow(1, 1, 2); });  // gaps
  times({5, 2, 3});
  view([](const at::Tensor& x) { return x.select(1, 1); });
  view([](const at::Tensor& x) { return x.unsqueeze(0).expand({4, 5, 3}); });  // stride 0
  times({4, 1, 3});
  view([](const at::Tensor& x) { return x.narrow(0, 0, 0).sum() + x.permute({2, 0, 1}); });
  view([](const at::Tensor& x) { return x.sum(); });  // its gradient has strides 0
  return model;
}

struct Place {
  int64_t micro_batch = 0;
  int64_t layer = 0;
  auto operator<=>(const Place&) const = default;
};

struct Record {
  std::map<Place, std::vector<int64_t>> output_strides, gradient_strides;
  std::map<Place, std::vector<at::Tensor>> gradients;  // of the layer's parameters, of one micro-batch alone
  std::map<int64_t, at::Tensor> losses;
};

// The canonical tree, by naive recursion.
inline at::Tensor tree_sum(const std::vector<at::Tensor>& leaves, size_t begin, size_t end) {
  if (end - begin == 1) return leaves[begin].clone();
  size_t half = 1;
  while (2 * half < end - begin) half *= 2;
  return tree_sum(leaves, begin, begin + half) + tree_sum(leaves, begin + half, end);
}

inline at::Tensor run_layers(StackModel& model, LayerRange range, at::Tensor x, int64_t micro_batch, Record& record) {
  const nn::StepScope randomness({7, 3, static_cast<uint64_t>(micro_batch)});
  const nn::AutocastGuard autocast(at::kCPU, model.bf16);
  for (int64_t layer = range.begin; layer < range.end; ++layer) {
    x = model.layers[layer].forward(std::move(x), micro_batch);
    const Place place{micro_batch, layer};
    record.output_strides[place] = x.strides().vec();
    if (x.requires_grad())
      x.register_hook(
          [&record, place](const at::Tensor& gradient) { record.gradient_strides[place] = gradient.strides().vec(); });
  }
  return x;
}

inline void take_gradients(StackModel& model, LayerRange range, int64_t micro_batch, Record& record) {
  for (int64_t layer = range.begin; layer < range.end; ++layer) {
    for (at::Tensor& parameter : model.layers[layer].parameters) {
      record.gradients[{micro_batch, layer}].push_back(parameter.grad());
      parameter.mutable_grad().reset();
    }
  }
}

inline at::Tensor loss_weight(int64_t, const at::Tensor& loss) { return at::full_like(loss, 1.0f / 24); }

// Micro-batches 0 .. one after the other in one graph each, on one thread.
inline Record run_uncut(const std::function<StackModel()>& make, int64_t num_micro_batches) {
  Record record;
  run_local_ranks(1, [&](ProcessGroup&) {
    StackModel model = make();
    const LayerRange all{0, static_cast<int64_t>(model.layers.size())};
    for (int64_t i = 0; i < num_micro_batches; ++i) {
      const at::Tensor loss = run_layers(model, all, model.batch(i), i, record);
      torch::autograd::backward({loss}, {loss_weight(i, loss)});
      take_gradients(model, all, i, record);
      record.losses[i] = loss.detach();
    }
  });
  return record;
}

// Layers as even as can be over the positions; some get none when there are many.
inline LayerSplit even_split(const StackModel& model, const PipelineSchedule& schedule) {
  const int64_t parts = schedule.num_positions(), layers = static_cast<int64_t>(model.layers.size());
  LayerSplit split;
  for (int64_t part = 0; part < parts; ++part) split.push_back(layers * (part + 1) / parts - layers * part / parts);
  return split;
}

// This stage's part of a model. `record` gets what this stage sees.
inline PipelineCallbacks stage_callbacks(StackModel& model, const LayerSplit& split, const PipelineSchedule& schedule,
                                         int stage, Record& record) {
  const auto range = [&split, stage, p = schedule.num_stages](int chunk) {
    return layers_of_part(split, chunk * p + stage);
  };
  PipelineCallbacks callbacks;
  callbacks.forward = [&, range, stage](int64_t micro_batch, int chunk, at::Tensor input) {
    if (chunk == 0 && stage == 0) input = model.batch(micro_batch);
    return run_layers(model, range(chunk), std::move(input), micro_batch, record);
  };
  callbacks.loss_gradient = loss_weight;
  callbacks.after_backward = [&, range](int64_t micro_batch, int chunk) {
    take_gradients(model, range(chunk), micro_batch, record);
  };
  return callbacks;
}

inline Record run_cut(ProcessGroup& pipeline, const std::function<StackModel()>& make,
                      const PipelineSchedule& schedule) {
  StackModel model = make();
  const LayerSplit split = even_split(model, schedule);
  Record record;
  PipelineRunner runner(pipeline);
  const auto losses = runner.run(schedule, stage_callbacks(model, split, schedule, pipeline.rank(), record));
  for (size_t i = 0; i < losses.size(); ++i) record.losses[static_cast<int64_t>(i)] = losses[i];
  return record;
}

// Everything in `part` is in `whole`, with the same bits; layers and micro-batches that only others saw are theirs.
inline void expect_same(const Record& part, const Record& whole, const std::string& where) {
  for (const auto& [place, strides] : part.output_strides) {
    EXPECT_EQ(strides, whole.output_strides.at(place)) << where << ": output of layer " << place.layer;
  }
  for (const auto& [place, strides] : part.gradient_strides) {
    EXPECT_EQ(strides, whole.gradient_strides.at(place)) << where << ": gradient into layer " << place.layer;
  }
  for (const auto& [place, gradients] : part.gradients) {
    for (size_t i = 0; i < gradients.size(); ++i) {
      EXPECT_TRUE(same_bits(gradients[i], whole.gradients.at(place)[i]))
          << where << ": parameter " << i << " of layer " << place.layer << ", micro-batch " << place.micro_batch;
    }
  }
  for (const auto& [micro_batch, loss] : part.losses)
    EXPECT_TRUE(same_bits(loss, whole.losses.at(micro_batch))) << where << ": loss of micro-batch " << micro_batch;
}

}  // namespace lockstep::test
