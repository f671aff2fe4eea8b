#pragma once

#include <string>

#include <torch/nn/module.h>

namespace image {

/// Shapes: B images, C channels, H x W pixels.
struct Config {
  std::string family = "resnet";  ///< resnet: residual convolutions with GroupNorm | vit: patches through a transformer
  int64_t channels = 1, height = 28, width = 28, num_classes = 10;
  int64_t model_width = 32;  ///< resnet: channels of the first stage; vit: size of the residual stream
  int64_t layers = 2;        ///< resnet: blocks a stage, three stages; vit: transformer blocks
  int64_t heads = 4, patch = 7;
};

/// @throws lockstep::ConfigError sizes that do not divide, with the mend.
Config resolve(Config config);

class Classifier : public torch::nn::Module {
 public:
  virtual at::Tensor logits(const at::Tensor& pixels_BCHW) = 0;  ///< [B, num_classes]
};

std::shared_ptr<Classifier> make_classifier(const Config& config);

/// Matrices and kernels normal with variance 2 / fan-in (He et al., arXiv:1502.01852), the last of each residual branch
/// zero; each from its own named stream.
void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed);

}  // namespace image
