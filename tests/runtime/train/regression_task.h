#pragma once

#include <cmath>
#include <functional>
#include <memory>
#include <string>

#include <torch/nn/module.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>
#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/nn/init.h>
#include <lockstep/sharding/unit.h>
#include <lockstep/train/task.h>

namespace lockstep::train::test {

/// Points of a noisy plane. Sample i weighs 1 + i % 3, so micro-batches count for different amounts.
class Plane : public data::Dataset {
 public:
  explicit Plane(int64_t size, std::string fingerprint = "plane") : size_(size), fingerprint_(std::move(fingerprint)) {}
  int64_t size() const override { return size_; }
  std::string fingerprint() const override { return fingerprint_; }
  data::Batch get(std::span<const int64_t> indices) const override {
    const auto n = static_cast<int64_t>(indices.size());
    data::Batch batch{{at::empty({n, 4}), at::empty({n}), at::empty({n})}, n};
    for (int64_t row = 0; row < n; ++row) {
      const auto i = static_cast<uint64_t>(indices[row]);
      float y = 0.1F * normal_at(9, i);
      for (uint64_t k = 0; k < 4; ++k) {
        const float x = normal_at(7, 4 * i + k);
        batch.tensors[0].data_ptr<float>()[4 * row + static_cast<int64_t>(k)] = x;
        y += x * static_cast<float>(k + 1);
      }
      batch.tensors[1].data_ptr<float>()[row] = y;
      batch.tensors[2].data_ptr<float>()[row] = static_cast<float>(1 + indices[row] % 3);
    }
    return batch;
  }

 private:
  int64_t size_;
  std::string fingerprint_;
};

/// Draws from LibTorch's generator as people's own modules do.
struct Noisy : torch::nn::Module {
  at::Tensor forward(const at::Tensor& x) { return x + dropout(at::tanh(linear(x))) * (1 + 0.1 * torch::rand_like(x)); }
  torch::nn::Linear linear = register_module("linear", torch::nn::Linear(8, 8));
  torch::nn::Dropout dropout = register_module("dropout", torch::nn::Dropout(0.5));
};

/// Fits the plane with two layers: the smallest task with everything a Trainer has to care for.
class RegressionTask : public Task {
 public:
  std::shared_ptr<const data::Dataset> training = std::make_shared<Plane>(50);
  std::shared_ptr<const data::Dataset> validation;
  std::function<void(at::Tensor& loss, const data::Batch& batch)> disturb;  ///< called in each micro-batch
  std::function<void(torch::nn::Module& model)> before_forward;             ///< likewise
  std::function<void(torch::nn::Module&)> when_finished;
  std::string config = "{}";
  std::string forgotten;  ///< by initialize()
  bool batch_norm = false, is_noisy = false;

  std::string name() const override { return "regression"; }
  std::shared_ptr<torch::nn::Module> make_model() override {
    torch::nn::Sequential model(torch::nn::Linear(4, 8), torch::nn::Tanh());
    if (batch_norm) model->push_back(torch::nn::BatchNorm1d(8));
    for (int i = 0; is_noisy && i < 2; ++i) model->push_back(unit<Noisy>());
    model->push_back(torch::nn::Linear(8, 1));
    return model.ptr();
  }
  void initialize(const std::string& parameter_name, const at::Tensor& parameter, uint64_t seed) override {
    if (parameter_name != forgotten) nn::fill_normal(parameter, seed, parameter_name, 0.5);
  }
  std::shared_ptr<const data::Dataset> training_data() override { return training; }
  std::shared_ptr<const data::Dataset> validation_data() override { return validation; }
  int64_t count(const data::Batch& batch) override {
    return static_cast<int64_t>(batch.tensors[2].narrow(0, 0, batch.valid_samples).sum().item<float>());
  }
  LossSum loss(torch::nn::Module& model, const data::Batch& batch) override {
    if (before_forward) before_forward(model);
    const int64_t n = batch.valid_samples;
    const at::Tensor wanted = batch.tensors[1].narrow(0, 0, n), weight = batch.tensors[2].narrow(0, 0, n);
    const at::Tensor error =
        dynamic_cast<torch::nn::SequentialImpl&>(model).forward(batch.tensors[0].narrow(0, 0, n)).view({-1}) - wanted;
    at::Tensor sum = (error * error * weight).sum();
    if (disturb) disturb(sum, batch);
    return {sum, ((error.abs() < 1.0).to(at::kFloat) * weight).sum()};
  }
  bool wants_finished_model() const override { return when_finished != nullptr; }
  void finished(torch::nn::Module& model) override {
    if (when_finished) when_finished(model);
  }
  std::string config_json() const override { return config; }
};

}  // namespace lockstep::train::test
