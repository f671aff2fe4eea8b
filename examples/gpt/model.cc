#include "model.h"

#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/norm.h>
#include <lockstep/sharding/context_parallel.h>
#include <lockstep/sharding/mixture_of_experts.h>
#include <lockstep/sharding/tensor_parallel.h>
#include <lockstep/sharding/vocab_parallel.h>

namespace gpt {

namespace nn = lockstep::nn;
using lockstep::ModelParallel;

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
  require(config.experts >= 0 && (config.experts == 0 || config.family == "llama"),
          "--experts=" + text(config.experts) + " is for --model=llama; 0 is a dense model");
  require(config.experts == 0 || (config.experts_per_token > 0 && config.experts_per_token <= config.experts),
          "--experts_per_token=" + text(config.experts_per_token) +
              " is not between 1 and --experts=" + text(config.experts));
  require(config.moe_aux_weight >= 0, "--moe_aux_weight must not be negative");
  require(config.norm_epsilon > 0 && config.rope_theta > 0, "--norm_epsilon and --rope_theta must be positive");
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
  explicit Norm(const Config& config) : is_layer_norm_(config.family == "gpt2"), epsilon_(config.norm_epsilon) {
    weight_ = register_parameter("weight", at::zeros({config.width}));
    if (is_layer_norm_) bias_ = register_parameter("bias", at::zeros({config.width}));
  }
  at::Tensor forward(const at::Tensor& x) const {
    return is_layer_norm_ ? nn::layer_norm(x, weight_, bias_, epsilon_) : nn::rms_norm(x, weight_, epsilon_);
  }

 private:
  bool is_layer_norm_;
  double epsilon_;
  at::Tensor weight_, bias_;
};

// Zeroes what one rank would zero of the whole [B, length, C], whatever part of the sequence this one has.
at::Tensor drop(const at::Tensor& x, const Config& config, bool training, uint64_t place, int64_t length,
                const ModelParallel& parallel) {
  if (parallel.context.size() == 1 || !training || config.dropout <= 0)
    return lockstep::sequence_dropout(x, config.dropout, training, place, length, parallel.tensor);
  const at::Tensor kept = nn::dropout(at::ones({x.size(0), length, x.size(2)}), config.dropout, training, place);
  const at::Tensor mine = lockstep::context_slice(kept, 1, parallel.context);
  const lockstep::Part part = lockstep::sequence_part(mine.size(1), parallel.tensor);
  return x * mine.narrow(1, part.begin, part.size).to(x.scalar_type());
}

class EmbeddingLayer : public lockstep::StackLayer {
 public:
  EmbeddingLayer(const Config& config, const ModelParallel& parallel) : config_(config), parallel_(parallel) {
    tokens_ = register_module(
        "tokens", std::make_shared<lockstep::VocabParallelEmbedding>(config.vocab_size, config.width, parallel.tensor));
    if (config.family == "gpt2")
      positions_ = register_parameter("positions", at::zeros({config.sequence_length, config.width}));
  }

  at::Tensor forward(at::Tensor, const Batch& batch) override {
    const int64_t length = batch[0].size(1);
    const at::Tensor ids = lockstep::context_slice(batch[0], 1, parallel_.context);
    at::Tensor x = tokens_->forward(ids);
    if (positions_.defined()) {
      const lockstep::Part part = lockstep::sequence_part(ids.size(1), parallel_.tensor);
      x = x + lockstep::context_slice(positions_.narrow(0, 0, length), 0, parallel_.context)
                  .narrow(0, part.begin, part.size);
    }
    return drop(x, config_, is_training(), 1'000'000, length, parallel_);
  }

 private:
  Config config_;
  ModelParallel parallel_;
  std::shared_ptr<lockstep::VocabParallelEmbedding> tokens_;
  at::Tensor positions_;
};

// Cosines and sines of all positions: constants, so no buffers of the checkpoint.
using RopeTables = std::pair<at::Tensor, at::Tensor>;

// x + attention(norm(x)), then x + mlp(norm(x)); each of the two a tensor region (lockstep/sharding/tensor_parallel.h).
class Block : public lockstep::StackLayer {
 public:
  Block(const Config& config, const ModelParallel& parallel, uint64_t number, RopeTables tables)
      : config_(config),
        parallel_(parallel),
        number_(number),
        head_dim_(config.width / config.heads),
        tables_(std::move(tables)) {
    const int64_t width = config.width;
    const bool bias = !is_llama();
    const lockstep::TensorParallel& tp = parallel.tensor;
    const lockstep::HeadSplit split = lockstep::split_heads(config.heads, config.kv_heads, tp);
    const auto rows = lockstep::scaled(split.heads, head_dim_), kv_rows = lockstep::scaled(split.kv_heads, head_dim_);
    const auto column = [&](const char* name, int64_t out, const std::vector<lockstep::Part>& parts) {
      return register_module(name, std::make_shared<Column>(width, out, bias, tp, parts));
    };
    query_ = column("query", width, rows);
    key_ = column("key", config.kv_heads * head_dim_, kv_rows);
    value_ = column("value", config.kv_heads * head_dim_, kv_rows);
    projection_ = register_module("projection", std::make_shared<Row>(width, width, bias, tp, rows));
    if (config.experts > 0) {
      experts_ = register_module("experts", std::make_shared<lockstep::MixtureOfExperts>(mixture(config), parallel));
    } else {
      up_ = column("up", config.ffn_width, {});
      if (is_llama()) gate_ = column("gate", config.ffn_width, {});
      down_ = register_module("down", std::make_shared<Row>(config.ffn_width, width, bias, tp));
    }
    norm1_ = register_module("norm1", std::make_shared<Norm>(config));
    norm2_ = register_module("norm2", std::make_shared<Norm>(config));
  }

  at::Tensor forward(at::Tensor x_BTC, const Batch& batch) override {
    const int64_t length = batch[0].size(1);
    const auto drop_here = [&](const at::Tensor& y, uint64_t place) {
      return drop(y, config_, is_training(), 2 * number_ + place, length, parallel_);
    };
    const at::Tensor x = x_BTC + drop_here(attend(norm1_->forward(x_BTC), length), 0);
    return x + drop_here(feed_forward(norm2_->forward(x)), 1);
  }

 private:
  using Column = lockstep::ColumnParallelLinear;
  using Row = lockstep::RowParallelLinear;

  bool is_llama() const { return config_.family == "llama"; }

  at::Tensor attend(const at::Tensor& x, int64_t length) {
    const auto heads = [&](const at::Tensor& y) { return y.view({y.size(0), y.size(1), -1, head_dim_}); };
    const at::Tensor h = lockstep::enter_region(x, parallel_.tensor);
    at::Tensor q = heads(query_->inside(h)), k = heads(key_->inside(h));
    if (is_llama()) {
      if (tables_.first.device() != x.device()) tables_ = {tables_.first.to(x.device()), tables_.second.to(x.device())};
      const at::Tensor cosines = lockstep::context_slice(tables_.first.narrow(0, 0, length), 0, parallel_.context),
                       sines = lockstep::context_slice(tables_.second.narrow(0, 0, length), 0, parallel_.context);
      q = nn::rope(q, cosines, sines), k = nn::rope(k, cosines, sines);
    }
    return projection_->forward(
        lockstep::ring_attention(q, k, heads(value_->inside(h)), /*causal=*/true, parallel_.context));
  }

  static lockstep::MixtureOptions mixture(const Config& config) {
    return {.width = config.width,
            .ffn_width = config.ffn_width,
            .num_experts = config.experts,
            .top_k = config.experts_per_token,
            .balance_weight = config.moe_aux_weight};
  }

  at::Tensor feed_forward(const at::Tensor& x) {
    if (experts_) return experts_->forward(x);
    const at::Tensor h = lockstep::enter_region(x, parallel_.tensor);
    const at::Tensor up = up_->inside(h);
    return down_->forward(is_llama() ? nn::swiglu(gate_->inside(h), up) : nn::gelu(up));
  }

  Config config_;
  ModelParallel parallel_;
  uint64_t number_;
  int64_t head_dim_;
  RopeTables tables_;
  std::shared_ptr<Column> query_, key_, value_, gate_, up_;
  std::shared_ptr<Row> projection_, down_;
  std::shared_ptr<lockstep::MixtureOfExperts> experts_;  // in place of gate, up and down
  std::shared_ptr<Norm> norm1_, norm2_;
};

class Head : public lockstep::StackLayer {
 public:
  Head(const Config& config, const ModelParallel& parallel) : config_(config), parallel_(parallel) {
    norm_ = register_module("norm", std::make_shared<Norm>(config));
    output_ = register_module("output", std::make_shared<lockstep::ColumnParallelLinear>(
                                            config.width, config.vocab_size, /*bias=*/false, parallel.tensor));
  }

  at::Tensor forward(at::Tensor x_BTC, const Batch& batch) override {
    const at::Tensor x = norm_->forward(x_BTC);
    if (batch.size() < 2) return output_->forward(x).to(at::kFloat);
    return lockstep::vocab_parallel_cross_entropy_sum(x, output_->weight, config_.vocab_size,
                                                      lockstep::context_slice(batch[1], 1, parallel_.context),
                                                      parallel_.tensor);
  }

 private:
  Config config_;
  ModelParallel parallel_;
  std::shared_ptr<Norm> norm_;
  std::shared_ptr<lockstep::ColumnParallelLinear> output_;
};

// Costs in products of width x width a token.
std::vector<lockstep::LayerStack::Layer> layers_of(const Config& config, const ModelParallel& parallel) {
  RopeTables tables;
  if (config.family == "llama")
    tables = nn::rope_tables(config.sequence_length, config.width / config.heads, config.rope_theta);
  std::vector<lockstep::LayerStack::Layer> layers;
  layers.push_back({"embedding", [=] { return std::make_shared<EmbeddingLayer>(config, parallel); }, 0.1});
  const auto width = static_cast<double>(config.width);
  const double attention = 2 + 2.0 * static_cast<double>(config.kv_heads) / static_cast<double>(config.heads) +
                           static_cast<double>(config.sequence_length) / width;
  const double mlp = (config.family == "llama" ? 3 : 2) * static_cast<double>(config.ffn_width) / width *
                     static_cast<double>(config.experts > 0 ? config.experts_per_token : 1);
  for (int64_t i = 0; i < config.layers; ++i) {
    layers.push_back({"block" + std::to_string(i),
                      [=] { return std::make_shared<Block>(config, parallel, static_cast<uint64_t>(i), tables); },
                      attention + mlp});
  }
  layers.push_back({"head", [=] { return std::make_shared<Head>(config, parallel); },
                    static_cast<double>(config.vocab_size) / width});
  return layers;
}

}  // namespace

Model::Model(const Config& config, const ModelParallel& parallel)
    : LayerStack(layers_of(config, parallel),
                 config.tied_head ? std::vector<lockstep::Tie>{{"embedding.tokens.weight", "head.output.weight"}}
                                  : std::vector<lockstep::Tie>{}),
      config_(config) {
  lockstep::context_positions(config.sequence_length, parallel.context);  // refuses lengths that cannot be cut
}

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
  const at::Device device = model.parameters()[0].device();
  for (int64_t i = 0; i < count; ++i) {
    const auto length = std::min(static_cast<int64_t>(tokens.size()), model.config().sequence_length);
    const at::Tensor input = torch::tensor(std::vector<int64_t>(tokens.end() - length, tokens.end())).view({1, length});
    const at::Tensor last =
        model.forward({input.to(device)}).select(1, length - 1).view({-1}).cpu() / std::max(temperature, 1e-6);
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
