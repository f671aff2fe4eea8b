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

  bool is_noisy = false, counts_calls = false;
  std::shared_ptr<const data::Dataset> validation;
  std::function<LossSum(LayerStack& stack, const std::vector<at::Tensor>& batch)> own_loss;
  std::function<void(torch::nn::Module&)> when_finished;

  std::string name() const override { return "stack"; }
  std::shared_ptr<torch::nn::Module> make_model() override {
    std::vector<LayerStack::Layer> layers;
    layers.push_back({"first", [this] { return std::make_shared<Hidden>(4, *this); }});
    for (int64_t i = 0; i + 2 < layers_; ++i)
      layers.push_back({"hidden" + std::to_string(i), [this] { return std::make_shared<Hidden>(width_, *this); }});
    layers.push_back({"last", [width = width_] { return std::make_shared<Last>(width); }});
    return std::make_shared<LayerStack>(std::move(layers));
  }
  void initialize(const std::string& parameter_name, const at::Tensor& parameter, uint64_t seed) override {
    nn::fill_normal(parameter, seed, parameter_name, 1 / std::sqrt(static_cast<double>(width_)));
  }
  std::shared_ptr<const data::Dataset> training_data() override { return training_; }
  std::shared_ptr<const data::Dataset> validation_data() override { return validation; }
  int64_t count(const data::Batch& batch) override { return batch.valid_samples; }
  LossSum loss(torch::nn::Module& model, const data::Batch& batch) override {
    return own_loss ? own_loss(dynamic_cast<LayerStack&>(model), batch.valid_tensors()) : Task::loss(model, batch);
  }
  bool wants_finished_model() const override { return when_finished != nullptr; }
  void finished(torch::nn::Module& model) override { when_finished(model); }

 private:
  struct Hidden : StackLayer {
    Hidden(int64_t in, const StackTask& task) : linear(register_module("linear", torch::nn::Linear(in, task.width_))) {
      if (task.counts_calls) calls = register_buffer("calls", at::zeros({1}));
      if (task.is_noisy) dropout = register_module("dropout", torch::nn::Dropout(0.5));
    }
    at::Tensor forward(at::Tensor x, const std::vector<at::Tensor>& batch) override {
      at::Tensor y = at::tanh(linear->forward(x.defined() ? x : batch[0]));
      if (calls.defined()) calls += 1;
      return dropout ? dropout(y) * (1 + 0.1 * torch::rand_like(y)) : y;
    }
    torch::nn::Linear linear;
    at::Tensor calls;
    torch::nn::Dropout dropout = nullptr;
  };
  struct Last : StackLayer {
    explicit Last(int64_t width) : linear(register_module("linear", torch::nn::Linear(width, 1))) {}
    at::Tensor forward(at::Tensor x, const std::vector<at::Tensor>& batch) override {
      const at::Tensor y = linear->forward(x).view({-1});
      if (batch.size() == 1) return y;  // a task's own loss goes on
      const at::Tensor error = y - batch[1];
      return (error * error).sum();
    }
    torch::nn::Linear linear;
  };

  int64_t layers_, width_;
  std::shared_ptr<const data::Dataset> training_;
};

}  // namespace lockstep::train::test
