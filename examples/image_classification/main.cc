// Trains an image classifier, a residual convolutional net or a small vision transformer. What is here: the data, the
// loss, the accuracy. Ranks, precision, reduction, checkpoints and metrics are the Trainer's.
#include <gflags/gflags.h>
#include <nlohmann/json.hpp>

#include <lockstep/data/image_dataset.h>
#include <lockstep/nn/functions.h>
#include <lockstep/train/flags.h>
#include <lockstep/train/trainer.h>

#include "model.h"

DEFINE_string(model, "resnet", "resnet (residual convolutions, GroupNorm) | vit (vision transformer)");
DEFINE_int64(width, 32, "resnet: channels of the first stage; vit: size of the residual stream");
DEFINE_int64(layers, 2, "resnet: blocks in each of three stages; vit: transformer blocks");
DEFINE_int64(heads, 4, "vit: attention heads");
DEFINE_int64(patch, 7, "vit: pixels of a patch's side");
DEFINE_int64(holdout_every, 5, "every n-th image of --train_data is for validation; 0: train on all");

namespace image {
namespace {

using lockstep::data::Batch;
using lockstep::data::Dataset;

class Classification : public lockstep::train::Task {
 public:
  explicit Classification(const Config& config) : config_(resolve(config)) {}

  std::string name() const override { return "image_classification"; }
  std::shared_ptr<torch::nn::Module> make_model() override { return make_classifier(config_); }
  void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed) override {
    image::initialize(name, parameter, seed);
  }

  std::shared_ptr<const Dataset> training_data() override { return open(/*validation=*/false); }
  std::shared_ptr<const Dataset> validation_data() override {
    return FLAGS_holdout_every > 0 ? open(/*validation=*/true) : nullptr;
  }

  int64_t count(const Batch& batch) override { return batch.valid_samples; }

  lockstep::train::LossSum loss(torch::nn::Module& model, const Batch& batch) override {
    const at::Tensor pixels = batch.tensors[0].narrow(0, 0, batch.valid_samples),
                     labels = batch.tensors[1].narrow(0, 0, batch.valid_samples);
    const at::Tensor logits = dynamic_cast<Classifier&>(model).logits(pixels).to(at::kFloat);
    return {lockstep::nn::cross_entropy_sum(logits, labels), logits.argmax(1).eq(labels).sum()};
  }

  std::string config_json() const override {
    return nlohmann::ordered_json{{"model", config_.family},  {"width", config_.model_width},
                                  {"layers", config_.layers}, {"heads", config_.heads},
                                  {"patch", config_.patch},   {"holdout_every", FLAGS_holdout_every}}
        .dump();
  }

 private:
  std::shared_ptr<const Dataset> open(bool validation) const {
    return lockstep::data::open_image_dataset(lockstep::train::train_data_flag(), {.channels = config_.channels,
                                                                                   .height = config_.height,
                                                                                   .width = config_.width,
                                                                                   .num_classes = config_.num_classes,
                                                                                   .holdout_every = FLAGS_holdout_every,
                                                                                   .validation = validation});
  }

  Config config_;
};

}  // namespace
}  // namespace image

int main(int argc, char** argv) {
  return lockstep::train::run_training(
      argc, argv, "trains an image classifier on rows of pixels and a label", __FILE__, [] {
        return std::make_unique<image::Classification>(image::Config{.family = FLAGS_model,
                                                                     .model_width = FLAGS_width,
                                                                     .layers = FLAGS_layers,
                                                                     .heads = FLAGS_heads,
                                                                     .patch = FLAGS_patch});
      });
}
