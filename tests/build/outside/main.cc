// A program outside the tree, on the installed package: fits y = 2x - 1 on however many ranks it is started with.
#include <iostream>

#include <torch/nn/modules/linear.h>

#include <lockstep/train/trainer.h>

using namespace lockstep;

struct Points : data::Dataset {
  int64_t size() const override { return 64; }
  std::string fingerprint() const override { return "64 points"; }
  data::Batch get(std::span<const int64_t> indices) const override {
    std::vector<float> x(indices.begin(), indices.end());
    const at::Tensor t = torch::tensor(x).unsqueeze(1) / 64;
    return {{t, 2 * t - 1}, static_cast<int64_t>(indices.size())};
  }
};

struct Line : train::Task {
  std::string name() const override { return "line"; }
  std::shared_ptr<torch::nn::Module> make_model() override { return std::make_shared<torch::nn::LinearImpl>(1, 1); }
  void initialize(torch::nn::Module& model, uint64_t) override {
    torch::NoGradGuard no_grad;
    for (at::Tensor parameter : model.parameters()) parameter.zero_();
  }
  std::shared_ptr<const data::Dataset> training_data() override { return std::make_shared<Points>(); }
  int64_t count(const data::Batch& batch) override { return batch.valid_samples; }
  train::LossSum loss(torch::nn::Module& model, const data::Batch& batch) override {
    return {(model.as<torch::nn::Linear>()->forward(batch.tensors[0]) - batch.tensors[1]).square().sum(), {}};
  }
};

int main(int, char** argv) {
  train::Options options{.run_dir = argv[1], .steps = 200, .global_batch_size = 64};
  options.schedule.learning_rate = 0.1;
  options.weight_decay = 0;
  return run_rank(options.runtime, [&](Runtime& runtime) {
    Line line;
    const train::Result result = train::train(runtime.world(), runtime.device(), line, options);
    if (runtime.world().rank() == 0)
      std::cout << runtime.world().size() << " ranks, loss " << result.loss << " after " << result.steps << " steps\n";
    return result.loss < 1e-3 ? 0 : 1;
  });
}
