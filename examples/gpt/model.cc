#include "model.h"

#include <torch/torch.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>

namespace gpt {

namespace nn = lockstep::nn;

Config resolve(Config config) {
  const auto require = [](bool ok, const std::string& message) {
    if (!ok) throw lockstep::ConfigError(message);
  };
  const auto text = [](int64_t value) { return std::to_string(value); };
  require(config.family == "gpt2" || config.family == "llama",
          "--model=" + config.family + " is neither gpt2 nor llama");
  require(
      config.layers > 0 && config.width > 0 && config.heads > 0 && config.vocab_size > 1 && config.sequence_length > 0,
      "--layers, --width, --heads, --vocab_size and --sequence_length must be positive");
  require(config.width % config.heads == 0,
          "--width=" + text(config.width) + " is no multiple of --heads=" + text(config.heads));
  if (config.kv_heads == 0) config.kv_heads = config.heads;
  require(config.heads % config.kv_heads == 0,
          "--heads=" + text(config.heads) + " is no multiple of --kv_heads=" + text(config.kv_heads));
  require(config.family == "llama" || config.kv_heads == config.heads, "--kv_heads is for --model=llama");
  require(config.family == "gpt2" || config.width / config.heads % 2 == 0,
          "RoPE turns pairs: --width / --heads must be even");
  require(config.dropout >= 0 && config.dropout < 1, "--dropout must be in [0, 1)");
  if (config.ffn_width == 0)
    config.ffn_width = config.family == "gpt2" ? 4 * config.width : (8 * config.width / 3 + 63) / 64 * 64;
  return config;
}

namespace {

using Batch = std::vector<at::Tensor>;

// The family's norm.
class Norm : public torch::nn::Module {
 public:
  explicit Norm(const Config& config) : is_layer_norm_(config.family == "gpt2") {
    weight_ = register_parameter("weight", at::zeros({config.width}));
    if (is_layer_norm_) bias_ = register_parameter("bias", at::zeros({config.width}));
  }
  at::Tensor forward(const at::Tensor& x) const {
    return is_layer_norm_ ? nn::layer_norm(x, weight_, bias_, kEpsilon) : nn::rms_norm(x, weight_, kEpsilon);
  }

 private:
  static constexpr double kEpsilon = 1e-5;
  bool is_layer_norm_;
  at::Tensor weight_, bias_;
};

class EmbeddingLayer : public lockstep::StackLayer {
 public:
  explicit EmbeddingLayer(const Config& config) : config_(config) {
    weight_ = register_parameter("weight", at::zeros({config.vocab_size, config.width}));
    if (config.family == "gpt2")
      positions_ = register_parameter("positions", at::zeros({config.sequence_length, config.width}));
  }

  at::Tensor forward(at::Tensor, const Batch& batch) override {
    at::Tensor x = at::embedding(weight_, batch[0]);
    if (positions_.defined()) x = x + positions_.narrow(0, 0, batch[0].size(1));
    return nn::dropout(x, config_.dropout, is_training(), 1'000'000);
  }

 private:
  Config config_;
  at::Tensor weight_, positions_;
};

// Cosines and sines of all positions: constants, so no buffers of the checkpoint.
using RopeTables = std::pair<at::Tensor, at::Tensor>;

// x + attention(norm(x)), then x + mlp(norm(x)).
class Block : public lockstep::StackLayer {
 public:
  Block(const Config& config, uint64_t number, RopeTables tables)
      : config_(config), number_(number), tables_(std::move(tables)) {
    const int64_t width = config.width, head_dim = width / config.heads;
    const bool bias = !is_llama();
    qkv_ = register_module("qkv",
                           std::make_shared<nn::Linear>(width, (config.heads + 2 * config.kv_heads) * head_dim, bias));
    projection_ = register_module("projection", std::make_shared<nn::Linear>(width, width, bias));
    up_ = register_module("up", std::make_shared<nn::Linear>(width, config.ffn_width, bias));
    if (is_llama()) gate_ = register_module("gate", std::make_shared<nn::Linear>(width, config.ffn_width, bias));
    down_ = register_module("down", std::make_shared<nn::Linear>(config.ffn_width, width, bias));
    norm1_ = register_module("norm1", std::make_shared<Norm>(config));
    norm2_ = register_module("norm2", std::make_shared<Norm>(config));
  }

  at::Tensor forward(at::Tensor x_BTC, const Batch&) override {
    const at::Tensor x = x_BTC + drop(attend(norm1_->forward(x_BTC)), 0);
    return x + drop(feed_forward(norm2_->forward(x)), 1);
  }

 private:
  bool is_llama() const { return config_.family == "llama"; }
  at::Tensor drop(const at::Tensor& x, uint64_t place) {
    return nn::dropout(x, config_.dropout, is_training(), 2 * number_ + place);
  }

  at::Tensor attend(const at::Tensor& x) {
    const int64_t b = x.size(0), t = x.size(1), head_dim = config_.width / config_.heads;
    const auto parts = qkv_->forward(x)
                           .view({b, t, config_.heads + 2 * config_.kv_heads, head_dim})
                           .split_with_sizes({config_.heads, config_.kv_heads, config_.kv_heads}, 2);
    at::Tensor q = parts[0], k = parts[1];
    if (is_llama()) {
      const at::Tensor cosines = tables_.first.narrow(0, 0, t), sines = tables_.second.narrow(0, 0, t);
      q = nn::rope(q, cosines, sines), k = nn::rope(k, cosines, sines);
    }
    return projection_->forward(nn::attention(q, k, parts[2], /*causal=*/true));
  }

  at::Tensor feed_forward(const at::Tensor& x) {
    if (is_llama()) return down_->forward(nn::swiglu(gate_->forward(x), up_->forward(x)));
    return down_->forward(nn::gelu(up_->forward(x)));
  }

  Config config_;
  uint64_t number_;
  RopeTables tables_;
  std::shared_ptr<nn::Linear> qkv_, projection_, gate_, up_, down_;
  std::shared_ptr<Norm> norm1_, norm2_;
};

class Head : public lockstep::StackLayer {
 public:
  explicit Head(const Config& config) {
    norm_ = register_module("norm", std::make_shared<Norm>(config));
    weight_ = register_parameter("weight", at::zeros({config.vocab_size, config.width}));
  }

  at::Tensor forward(at::Tensor x_BTC, const Batch& batch) override {
    const at::Tensor x = norm_->forward(x_BTC);
    if (batch.size() < 2) return nn::linear(x, weight_, at::Tensor()).to(at::kFloat);
    return nn::linear_cross_entropy_sum(x.view({-1, x.size(-1)}), weight_, batch[1].reshape({-1}));
  }

 private:
  std::shared_ptr<Norm> norm_;
  at::Tensor weight_;
};

// Costs in products of width x width a token.
std::vector<lockstep::LayerStack::Layer> layers_of(const Config& config) {
  RopeTables tables;
  if (config.family == "llama")
    tables = nn::rope_tables(config.sequence_length, config.width / config.heads, config.rope_theta);
  std::vector<lockstep::LayerStack::Layer> layers;
  layers.push_back({"embedding", [config] { return std::make_shared<EmbeddingLayer>(config); }, 0.1});
  const auto width = static_cast<double>(config.width);
  const double attention = 2 + 2.0 * static_cast<double>(config.kv_heads) / static_cast<double>(config.heads) +
                           static_cast<double>(config.sequence_length) / width;
  const double mlp = (config.family == "llama" ? 3 : 2) * static_cast<double>(config.ffn_width) / width;
  for (int64_t i = 0; i < config.layers; ++i) {
    layers.push_back({"block" + std::to_string(i),
                      [config, i, tables] { return std::make_shared<Block>(config, static_cast<uint64_t>(i), tables); },
                      attention + mlp});
  }
  layers.push_back(
      {"head", [config] { return std::make_shared<Head>(config); }, static_cast<double>(config.vocab_size) / width});
  return layers;
}

}  // namespace

Model::Model(const Config& config)
    : LayerStack(layers_of(config), config.tied_head ? std::vector<lockstep::Tie>{{"embedding.weight", "head.weight"}}
                                                     : std::vector<lockstep::Tie>{}),
      config_(config) {}

void initialize(const Config& config, const std::string& name, const at::Tensor& parameter, uint64_t seed) {
  const bool into_residual = name.find("projection.") != std::string::npos || name.find("down.") != std::string::npos;
  if (parameter.dim() < 2) {
    nn::fill_constant(parameter, name.ends_with("weight") ? 1.0 : 0.0);
  } else {
    nn::fill_normal(parameter, seed, name,
                    into_residual ? 0.02 / std::sqrt(2.0 * static_cast<double>(config.layers)) : 0.02);
  }
}

std::vector<int64_t> generate(Model& model, std::vector<int64_t> tokens, int64_t count, double temperature,
                              int64_t top_k, uint64_t seed) {
  const torch::NoGradGuard no_grad;
  const uint64_t key = lockstep::stream_key(seed, "generate");
  for (int64_t i = 0; i < count; ++i) {
    const auto length = std::min(static_cast<int64_t>(tokens.size()), model.config().sequence_length);
    const at::Tensor input = torch::tensor(std::vector<int64_t>(tokens.end() - length, tokens.end())).view({1, length});
    const at::Tensor last = model.forward({input}).select(1, length - 1).view({-1}) / std::max(temperature, 1e-6);
    const auto [values, ids] = last.topk(std::min(top_k, last.numel()));
    const at::Tensor cumulative = values.softmax(0).cumsum(0).contiguous();
    const float draw = lockstep::uniform_at(key, static_cast<uint64_t>(i)) * cumulative[-1].item<float>();
    const auto* begin = cumulative.const_data_ptr<float>();
    const int64_t place =
        std::min(std::upper_bound(begin, begin + cumulative.numel(), draw) - begin, cumulative.numel() - 1);
    tokens.push_back(ids[place].item<int64_t>());
  }
  return tokens;
}

}  // namespace gpt
