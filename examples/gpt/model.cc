#include "model.h"

#include <torch/torch.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/init.h>

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

// x + attention(norm(x)), then x + mlp(norm(x)).
class Model::Block : public torch::nn::Module {
 public:
  Block(const Config& config, uint64_t number) : config_(config), number_(number) {
    const int64_t width = config.width, head_dim = width / config.heads;
    const bool bias = !is_llama();
    qkv_ = register_module("qkv",
                           std::make_shared<nn::Linear>(width, (config.heads + 2 * config.kv_heads) * head_dim, bias));
    projection_ = register_module("projection", std::make_shared<nn::Linear>(width, width, bias));
    up_ = register_module("up", std::make_shared<nn::Linear>(width, config.ffn_width, bias));
    if (is_llama()) gate_ = register_module("gate", std::make_shared<nn::Linear>(width, config.ffn_width, bias));
    down_ = register_module("down", std::make_shared<nn::Linear>(config.ffn_width, width, bias));
    if (is_llama()) {
      rms_[0] = register_module("norm1", std::make_shared<nn::RmsNorm>(width));
      rms_[1] = register_module("norm2", std::make_shared<nn::RmsNorm>(width));
    } else {
      layer_[0] = register_module("norm1", std::make_shared<nn::LayerNorm>(width));
      layer_[1] = register_module("norm2", std::make_shared<nn::LayerNorm>(width));
    }
  }

  at::Tensor forward(const at::Tensor& x_BTC, const at::Tensor& cosines, const at::Tensor& sines) {
    const at::Tensor x = x_BTC + drop(attend(norm(0, x_BTC), cosines, sines), 0);
    return x + drop(feed_forward(norm(1, x)), 1);
  }

 private:
  bool is_llama() const { return config_.family == "llama"; }
  at::Tensor norm(int which, const at::Tensor& x) {
    return is_llama() ? rms_[which]->forward(x) : layer_[which]->forward(x);
  }
  at::Tensor drop(const at::Tensor& x, uint64_t place) {
    return nn::dropout(x, config_.dropout, is_training(), 2 * number_ + place);
  }

  at::Tensor attend(const at::Tensor& x, const at::Tensor& cosines, const at::Tensor& sines) {
    const int64_t b = x.size(0), t = x.size(1), head_dim = config_.width / config_.heads;
    const auto parts = qkv_->forward(x)
                           .view({b, t, config_.heads + 2 * config_.kv_heads, head_dim})
                           .split_with_sizes({config_.heads, config_.kv_heads, config_.kv_heads}, 2);
    at::Tensor q = parts[0], k = parts[1];
    if (is_llama()) q = nn::rope(q, cosines, sines), k = nn::rope(k, cosines, sines);
    return projection_->forward(nn::attention(q, k, parts[2], /*causal=*/true));
  }

  at::Tensor feed_forward(const at::Tensor& x) {
    if (is_llama()) return down_->forward(nn::swiglu(gate_->forward(x), up_->forward(x)));
    return down_->forward(nn::gelu(up_->forward(x)));
  }

  Config config_;
  uint64_t number_;
  std::shared_ptr<nn::Linear> qkv_, projection_, gate_, up_, down_;
  std::shared_ptr<nn::LayerNorm> layer_[2];
  std::shared_ptr<nn::RmsNorm> rms_[2];
};

Model::Model(const Config& config) : config_(config) {
  embedding_ = register_module("embedding", std::make_shared<nn::Embedding>(config.vocab_size, config.width));
  if (config.family == "gpt2") {
    positions_ = register_module("positions", std::make_shared<nn::Embedding>(config.sequence_length, config.width));
  } else {
    std::tie(cosines_, sines_) =
        nn::rope_tables(config.sequence_length, config.width / config.heads, config.rope_theta);
  }
  for (int64_t i = 0; i < config.layers; ++i) {
    blocks_.push_back(
        register_module("block" + std::to_string(i), std::make_shared<Block>(config, static_cast<uint64_t>(i))));
  }
  if (config.family == "gpt2") {
    layer_norm_ = register_module("norm", std::make_shared<nn::LayerNorm>(config.width));
  } else {
    rms_norm_ = register_module("norm", std::make_shared<nn::RmsNorm>(config.width));
  }
  if (!config.tied_head)
    head_ = register_module("head", std::make_shared<nn::Linear>(config.width, config.vocab_size, /*bias=*/false));
}

Model::~Model() = default;

at::Tensor Model::hidden(const at::Tensor& tokens_BT) {
  const int64_t length = tokens_BT.size(1);
  at::Tensor x = embedding_->forward(tokens_BT);
  if (positions_) x = x + positions_->weight.narrow(0, 0, length);
  x = nn::dropout(x, config_.dropout, is_training(), 1'000'000);
  const at::Tensor cosines = cosines_.defined() ? cosines_.narrow(0, 0, length) : cosines_,
                   sines = sines_.defined() ? sines_.narrow(0, 0, length) : sines_;
  for (const auto& block : blocks_) x = block->forward(x, cosines, sines);
  return layer_norm_ ? layer_norm_->forward(x) : rms_norm_->forward(x);
}

at::Tensor Model::loss_sum(const at::Tensor& tokens_BT, const at::Tensor& targets_BT) {
  return nn::linear_cross_entropy_sum(hidden(tokens_BT).view({-1, config_.width}), head_weight(),
                                      targets_BT.reshape({-1}));
}

at::Tensor Model::logits(const at::Tensor& hidden_BTC) {
  return nn::linear(hidden_BTC, head_weight(), at::Tensor()).to(at::kFloat);
}

void Model::initialize(uint64_t seed) {
  for (const auto& item : named_parameters()) {
    const std::string& name = item.key();
    const bool into_residual = name.find("projection.") != std::string::npos || name.find("down.") != std::string::npos;
    if (item.value().dim() < 2) {
      nn::fill_constant(item.value(), name.ends_with("weight") ? 1.0 : 0.0);
    } else {
      nn::fill_normal(item.value(), seed, name,
                      into_residual ? 0.02 / std::sqrt(2.0 * static_cast<double>(config_.layers)) : 0.02);
    }
  }
}

std::vector<int64_t> generate(Model& model, std::vector<int64_t> tokens, int64_t count, double temperature,
                              int64_t top_k, uint64_t seed) {
  const torch::NoGradGuard no_grad;
  const uint64_t key = lockstep::stream_key(seed, "generate");
  for (int64_t i = 0; i < count; ++i) {
    const auto length = std::min(static_cast<int64_t>(tokens.size()), model.config().sequence_length);
    const at::Tensor input = torch::tensor(std::vector<int64_t>(tokens.end() - length, tokens.end())).view({1, length});
    const at::Tensor last =
        model.logits(model.hidden(input).select(1, length - 1)).view({-1}) / std::max(temperature, 1e-6);
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
