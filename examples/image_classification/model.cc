#include "model.h"

#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>

namespace image {
namespace {

namespace nn = lockstep::nn;

constexpr int64_t kGroups = 8;  // of GroupNorm: no statistics across samples, so the bits do not depend on the layout

// Convolution 3x3 without bias, then GroupNorm.
class ConvNorm : public torch::nn::Module {
 public:
  ConvNorm(int64_t in, int64_t out, int64_t stride) : stride_(stride) {
    kernel_ = register_parameter("kernel", at::zeros({out, in, 3, 3}));
    scale_ = register_parameter("norm_weight", at::ones({out}));
    shift_ = register_parameter("norm_bias", at::zeros({out}));
  }
  at::Tensor forward(const at::Tensor& x) {
    return at::group_norm(at::conv2d(x, kernel_, {}, stride_, 1), kGroups, scale_, shift_);
  }

 private:
  int64_t stride_;
  at::Tensor kernel_, scale_, shift_;
};

class ResidualBlock : public torch::nn::Module {
 public:
  ResidualBlock(int64_t in, int64_t out, int64_t stride) {
    first_ = register_module("first", std::make_shared<ConvNorm>(in, out, stride));
    second_ = register_module("second", std::make_shared<ConvNorm>(out, out, 1));
    if (in != out || stride != 1) shortcut_ = register_module("shortcut", std::make_shared<ConvNorm>(in, out, stride));
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor branch = second_->forward(first_->forward(x).relu());
    return (branch + (shortcut_ ? shortcut_->forward(x) : x)).relu();
  }

 private:
  std::shared_ptr<ConvNorm> first_, second_, shortcut_;
};

class ResNet : public Classifier {
 public:
  explicit ResNet(const Config& config) {
    stem_ = register_module("stem", std::make_shared<ConvNorm>(config.channels, config.model_width, 1));
    int64_t channels = config.model_width;
    for (int64_t stage = 0; stage < 3; ++stage) {
      for (int64_t layer = 0; layer < config.layers; ++layer) {
        const bool shrinks = stage > 0 && layer == 0;
        const int64_t out = shrinks ? 2 * channels : channels;
        blocks_.push_back(register_module("block" + std::to_string(blocks_.size()),
                                          std::make_shared<ResidualBlock>(channels, out, shrinks ? 2 : 1)));
        channels = out;
      }
    }
    head_ = register_module("head", std::make_shared<nn::Linear>(channels, config.num_classes));
  }

  at::Tensor logits(const at::Tensor& pixels_BCHW) override {
    at::Tensor x = stem_->forward(pixels_BCHW).relu();
    for (const auto& block : blocks_) x = block->forward(x);
    return head_->forward(x.mean({2, 3}));
  }

 private:
  std::shared_ptr<ConvNorm> stem_;
  std::vector<std::shared_ptr<ResidualBlock>> blocks_;
  std::shared_ptr<nn::Linear> head_;
};

class EncoderBlock : public torch::nn::Module {
 public:
  EncoderBlock(int64_t width, int64_t heads) : heads_(heads) {
    norm1_ = register_module("norm1", std::make_shared<nn::LayerNorm>(width));
    qkv_ = register_module("qkv", std::make_shared<nn::Linear>(width, 3 * width));
    projection_ = register_module("projection", std::make_shared<nn::Linear>(width, width));
    norm2_ = register_module("norm2", std::make_shared<nn::LayerNorm>(width));
    up_ = register_module("up", std::make_shared<nn::Linear>(width, 4 * width));
    down_ = register_module("down", std::make_shared<nn::Linear>(4 * width, width));
  }
  at::Tensor forward(const at::Tensor& x_BTC) {
    const int64_t b = x_BTC.size(0), t = x_BTC.size(1), c = x_BTC.size(2);
    const auto qkv = qkv_->forward(norm1_->forward(x_BTC)).view({b, t, 3, heads_, c / heads_}).unbind(2);
    const at::Tensor x = x_BTC + projection_->forward(nn::attention(qkv[0], qkv[1], qkv[2], /*causal=*/false));
    return x + down_->forward(nn::gelu(up_->forward(norm2_->forward(x))));
  }

 private:
  int64_t heads_;
  std::shared_ptr<nn::LayerNorm> norm1_, norm2_;
  std::shared_ptr<nn::Linear> qkv_, projection_, up_, down_;
};

// Patches as tokens, mean over tokens at the end. Source: Dosovitskiy et al., arXiv:2010.11929.
class VisionTransformer : public Classifier {
 public:
  explicit VisionTransformer(const Config& config) : config_(config) {
    const int64_t tokens = config.height / config.patch * (config.width / config.patch);
    patches_ = register_module(
        "patches", std::make_shared<nn::Linear>(config.channels * config.patch * config.patch, config.model_width));
    positions_ = register_module("positions", std::make_shared<nn::Embedding>(tokens, config.model_width));
    for (int64_t i = 0; i < config.layers; ++i) {
      blocks_.push_back(register_module("block" + std::to_string(i),
                                        std::make_shared<EncoderBlock>(config.model_width, config.heads)));
    }
    norm_ = register_module("norm", std::make_shared<nn::LayerNorm>(config.model_width));
    head_ = register_module("head", std::make_shared<nn::Linear>(config.model_width, config.num_classes));
  }

  at::Tensor logits(const at::Tensor& pixels_BCHW) override {
    const int64_t p = config_.patch, rows = config_.height / p, columns = config_.width / p;
    const at::Tensor tokens = pixels_BCHW.view({-1, config_.channels, rows, p, columns, p})
                                  .permute({0, 2, 4, 1, 3, 5})
                                  .reshape({-1, rows * columns, config_.channels * p * p});
    at::Tensor x = patches_->forward(tokens) + positions_->weight;
    for (const auto& block : blocks_) x = block->forward(x);
    return head_->forward(norm_->forward(x).mean(1));
  }

 private:
  Config config_;
  std::shared_ptr<nn::Linear> patches_, head_;
  std::shared_ptr<nn::Embedding> positions_;
  std::vector<std::shared_ptr<EncoderBlock>> blocks_;
  std::shared_ptr<nn::LayerNorm> norm_;
};

}  // namespace

Config resolve(Config config) {
  const auto require = [](bool ok, const std::string& message) {
    if (!ok) throw lockstep::ConfigError(message);
  };
  require(config.family == "resnet" || config.family == "vit",
          "--model=" + config.family + " is neither resnet nor vit");
  require(config.layers > 0 && config.model_width > 0 && config.heads > 0 && config.patch > 0,
          "--layers, --width, --heads and --patch must be positive");
  if (config.family == "resnet") {
    require(config.model_width % kGroups == 0, "--width=" + std::to_string(config.model_width) +
                                                   " is no multiple of the " + std::to_string(kGroups) +
                                                   " groups of GroupNorm");
  } else {
    require(config.model_width % config.heads == 0, "--width=" + std::to_string(config.model_width) +
                                                        " is no multiple of --heads=" + std::to_string(config.heads));
    require(config.height % config.patch == 0 && config.width % config.patch == 0,
            "--patch=" + std::to_string(config.patch) + " does not divide images of " + std::to_string(config.height) +
                " x " + std::to_string(config.width));
  }
  return config;
}

std::shared_ptr<Classifier> make_classifier(const Config& config) {
  if (config.family == "resnet") return std::make_shared<ResNet>(config);
  return std::make_shared<VisionTransformer>(config);
}

void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed) {
  const bool ends_branch = name.find("projection.") != std::string::npos || name.find("down.") != std::string::npos;
  if (name.find("second.norm_weight") != std::string::npos || ends_branch) {
    nn::fill_constant(parameter, 0.0);
  } else if (parameter.dim() < 2) {
    nn::fill_constant(parameter, name.ends_with("weight") ? 1.0 : 0.0);
  } else {
    const int64_t fan_in = parameter.numel() / parameter.size(0);
    nn::fill_normal(parameter, seed, name, std::sqrt(2.0 / static_cast<double>(fan_in)));
  }
}

}  // namespace image
