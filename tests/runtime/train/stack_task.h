#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <lockstep/nn/init.h>
#include <lockstep/sharding/layer_stack.h>
#include <lockstep/train/task.h>

#include "regression_task.h"

namespace lockstep::train::test {

/// Fits the plane with a stack of layers: what pipelines cut and ZeRO-3 gathers piece by piece.
class StackTask : public Task {
 public:
  explicit StackTask(int64_t layers = 4, int64_t width = 8, int64_t samples = 50)
      : layers_(layers), width_(width), training_(std::make_shared<Plane>(samples)) {}

  std::string name() const override { return "stack"; }
  std::shared_ptr<torch::nn::Module> make_model() override {
    std::vector<LayerStack::Layer> layers;
    layers.push_back({"first", [width = width_] { return std::make_shared<Hidden>(4, width); }});
    for (int64_t i = 0; i + 2 < layers_; ++i)
      layers.push_back(
          {"hidden" + std::to_string(i), [width = width_] { return std::make_shared<Hidden>(width, width); }});
    layers.push_back({"last", [width = width_] { return std::make_shared<Last>(width); }});
    return std::make_shared<LayerStack>(std::move(layers));
  }
  void initialize(const std::string& parameter_name, const at::Tensor& parameter, uint64_t seed) override {
    nn::fill_normal(parameter, seed, parameter_name, 1 / std::sqrt(static_cast<double>(width_)));
  }
  std::shared_ptr<const data::Dataset> training_data() override { return training_; }
  int64_t count(const data::Batch& batch) override { return batch.valid_samples; }

 private:
  struct Hidden : StackLayer {
    Hidden(int64_t in, int64_t out) : linear(register_module("linear", torch::nn::Linear(in, out))) {}
    at::Tensor forward(at::Tensor x, const std::vector<at::Tensor>& batch) override {
      return at::tanh(linear->forward(x.defined() ? x : batch[0]));
    }
    torch::nn::Linear linear;
  };
  struct Last : StackLayer {
    explicit Last(int64_t width) : linear(register_module("linear", torch::nn::Linear(width, 1))) {}
    at::Tensor forward(at::Tensor x, const std::vector<at::Tensor>& batch) override {
      const at::Tensor error = linear->forward(x).view({-1}) - batch[1];
      return (error * error).sum();
    }
    torch::nn::Linear linear;
  };

  int64_t layers_, width_;
  std::shared_ptr<const data::Dataset> training_;
};

}  // namespace lockstep::train::test
