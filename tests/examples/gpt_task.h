#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>

#include <ATen/ops/empty.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/train/task.h>

#include "../../examples/gpt/model.h"

namespace lockstep::train {

/// Samples that a rule makes, so that there is something to learn.
class MadeUp : public data::Dataset {
 public:
  explicit MadeUp(std::function<data::Batch(std::span<const int64_t>)> make) : make_(std::move(make)) {}
  int64_t size() const override { return 200; }
  data::Batch get(std::span<const int64_t> indices) const override { return make_(indices); }
  std::string fingerprint() const override { return "made up"; }

 private:
  std::function<data::Batch(std::span<const int64_t>)> make_;
};

inline float noise(int64_t sample, int64_t place) {
  return static_cast<float>(
      uniform_at(stream_key(5, "noise"), static_cast<uint64_t>(sample) << 20 | static_cast<uint64_t>(place)));
}

/// The GPT of examples/, tiny, with dropout.
class GptTask : public Task {
 public:
  std::string name() const override { return "gpt"; }
  std::shared_ptr<torch::nn::Module> make_model(const ModelParallel& parallel) override {
    return std::make_shared<gpt::Model>(config_, parallel);
  }
  void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed) override {
    gpt::initialize(config_, name, parameter, seed);
  }
  std::shared_ptr<const data::Dataset> training_data() override {
    return std::make_shared<MadeUp>([](std::span<const int64_t> indices) {
      const auto samples = static_cast<int64_t>(indices.size());
      const at::Tensor tokens = at::empty({samples, kLength + 1}, at::kLong);
      for (int64_t i = 0; i < samples; ++i) {
        for (int64_t t = 0; t <= kLength; ++t)
          tokens[i][t] = (indices[i] + 7 * t + (noise(indices[i], t) < 0.1F ? 3 : 0)) % 61;
      }
      return data::Batch{{tokens.narrow(1, 0, kLength).contiguous(), tokens.narrow(1, 1, kLength).contiguous()},
                         samples};
    });
  }
  int64_t count(const data::Batch& batch) override { return batch.valid_samples * kLength; }

 protected:
  static constexpr int64_t kLength = 24;
  gpt::Config config_ = gpt::resolve(
      {.layers = 2, .width = 48, .heads = 3, .vocab_size = 61, .sequence_length = kLength, .dropout = 0.1});
};

}  // namespace lockstep::train
