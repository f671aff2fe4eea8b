#include "models.h"

#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/norm.h>
#include <lockstep/sharding/layer_stack.h>
#include <lockstep/sharding/unit.h>

#include "../../examples/gpt/model.h"

namespace lockstep::fuzz {
namespace {

using Batch = std::vector<at::Tensor>;

constexpr int64_t kSamples = 113, kValidationSamples = 11;
constexpr int64_t kFeatures = 5, kRows = 2;   // of a sample of the stack and of the plain model
constexpr int64_t kImage = 6, kChannels = 2;  // of a sample of the convolutional model
constexpr int64_t kGroups = 3;                // of its norms

bool is_frozen(const Case& c, int64_t layer) { return (c.frozen >> layer & 1) != 0; }

// Either all of a layer is frozen or all but its last parameter.
void freeze(const Case& c, int64_t layer, torch::nn::Module& module) {
  if (!is_frozen(c, layer)) return;
  auto parameters = module.parameters();
  if (layer % 2 == 1 && parameters.size() > 1) parameters.pop_back();
  for (at::Tensor& parameter : parameters) parameter.requires_grad_(false);
}

int64_t width_of(const Case& c) { return c.heads * c.head_dim + 1; }  // odd

// Rows into the model's width.
class First : public StackLayer {
 public:
  explicit First(const Case& c) {
    linear_ = register_module("linear", std::make_shared<nn::Linear>(kFeatures, width_of(c)));
  }
  at::Tensor forward(at::Tensor, const Batch& batch) override { return linear_->forward(batch[0]).tanh(); }

 private:
  std::shared_ptr<nn::Linear> linear_;
};

// Residual, with a parameter of one element and one of one row.
class Mixing : public StackLayer {
 public:
  Mixing(const Case& c, int64_t number) : dropout_(static_cast<double>(c.dropout) / 100), number_(number) {
    weight_ = register_parameter("weight", at::zeros({width_of(c), width_of(c)}));
    row_ = register_parameter("row", at::zeros({1, width_of(c)}));
    gain_ = register_parameter("gain", at::zeros({}));
  }
  at::Tensor forward(at::Tensor x, const Batch&) override {
    const at::Tensor y = nn::linear(x, weight_, {}).tanh() * gain_ + row_;
    return x + nn::dropout(y, dropout_, is_training(), static_cast<uint64_t>(number_));
  }

 private:
  double dropout_;
  int64_t number_;
  at::Tensor weight_, row_, gain_;
};

class FeedForward : public StackLayer {
 public:
  FeedForward(const Case& c, int64_t number) : dropout_(static_cast<double>(c.dropout) / 100), number_(number) {
    norm_ = register_module("norm", std::make_shared<nn::LayerNorm>(width_of(c)));
    up_ = register_module("up", std::make_shared<nn::Linear>(width_of(c), c.ffn_width));
    down_ = register_module("down", std::make_shared<nn::Linear>(c.ffn_width, width_of(c), /*bias=*/false));
  }
  at::Tensor forward(at::Tensor x, const Batch&) override {
    const at::Tensor y = down_->forward(nn::gelu(up_->forward(norm_->forward(x))));
    return x + nn::dropout(y, dropout_, is_training(), static_cast<uint64_t>(number_));
  }

 private:
  double dropout_;
  int64_t number_;
  std::shared_ptr<nn::LayerNorm> norm_;
  std::shared_ptr<nn::Linear> up_, down_;
};

// No parameters, strides that are not usual, and memory changed in place.
class Passing : public StackLayer {
 public:
  at::Tensor forward(at::Tensor x, const Batch&) override {
    return (x * 0.7).tanh_().transpose(0, 1).contiguous().transpose(0, 1);
  }
};

class Last : public StackLayer {
 public:
  explicit Last(const Case& c) { weight_ = register_parameter("weight", at::zeros({c.vocab, width_of(c)})); }
  at::Tensor forward(at::Tensor x, const Batch& batch) override {
    return nn::linear_cross_entropy_sum(x.reshape({-1, x.size(-1)}), weight_, batch[1].reshape({-1}));
  }

 private:
  at::Tensor weight_;
};

// Which layer stands where in a stack, by its number: 1 .. layers.
std::shared_ptr<StackLayer> middle_layer(const Case& c, int64_t number) {
  if (number % 3 == 1) return std::make_shared<Mixing>(c, number);
  if (number % 3 == 2) return std::make_shared<FeedForward>(c, number);
  return c.seed % 2 ? std::shared_ptr<StackLayer>(std::make_shared<Passing>()) : std::make_shared<Mixing>(c, number);
}

class ConvFirst : public StackLayer {
 public:
  explicit ConvFirst(const Case& c) : channels_last_(c.seed % 2 == 1) {
    weight_ = register_parameter("weight", at::zeros({kGroups * c.heads, kChannels, 3, 3}));
  }
  at::Tensor forward(at::Tensor, const Batch& batch) override {
    const auto format = channels_last_ ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    return at::conv2d(batch[0].contiguous(format), weight_, {}, 1, 1);
  }

 private:
  bool channels_last_;
  at::Tensor weight_;
};

class ConvBlock : public StackLayer {
 public:
  explicit ConvBlock(const Case& c) {
    const int64_t channels = kGroups * c.heads;
    weight_ = register_parameter("weight", at::zeros({channels, channels, 3, 3}));
    scale_ = register_parameter("scale", at::zeros({channels}));
    shift_ = register_parameter("shift", at::zeros({channels}));
  }
  at::Tensor forward(at::Tensor x, const Batch&) override {
    // Contiguous: where its input needs no gradient, LibTorch's backward of group_norm crashes in channels-last.
    return at::group_norm(at::conv2d(x, weight_, {}, 1, 1).contiguous(), kGroups, scale_, shift_).relu_() + x;
  }

 private:
  at::Tensor weight_, scale_, shift_;
};

class ConvLast : public StackLayer {
 public:
  explicit ConvLast(const Case& c) {
    linear_ = register_module("linear", std::make_shared<nn::Linear>(kGroups * c.heads, c.vocab));
  }
  at::Tensor forward(at::Tensor x, const Batch& batch) override {
    return nn::cross_entropy_sum(linear_->forward(x.mean({2, 3})).to(at::kFloat), batch[1].select(1, 0));
  }

 private:
  std::shared_ptr<nn::Linear> linear_;
};

std::shared_ptr<StackLayer> make_layer(const Case& c, int64_t number) {
  const bool is_first = number == 0, is_last = number == c.num_layers() - 1;
  std::shared_ptr<StackLayer> layer;
  if (c.model == kConv) {
    if (is_first)
      layer = std::make_shared<ConvFirst>(c);
    else if (is_last)
      layer = std::make_shared<ConvLast>(c);
    else
      layer = std::make_shared<ConvBlock>(c);
  } else {
    if (is_first)
      layer = std::make_shared<First>(c);
    else if (is_last)
      layer = std::make_shared<Last>(c);
    else
      layer = middle_layer(c, number);
  }
  if (!is_last) freeze(c, number, *layer);
  return layer;
}

std::shared_ptr<LayerStack> make_stack(const Case& c) {
  std::vector<LayerStack::Layer> layers;
  for (int64_t i = 0; i < c.num_layers(); ++i)
    layers.push_back(
        {"layer" + std::to_string(i), [c, i] { return make_layer(c, i); }, 1.0 + 0.3 * static_cast<double>(i % 3)});
  std::vector<Tie> ties;
  const bool has_two = c.model == kStack && c.layers >= 4;  // Mixing is layer 1 and layer 4
  if (c.tied && has_two && !is_frozen(c, 1) && !is_frozen(c, 4)) ties.push_back({"layer1.weight", "layer4.weight"});
  return std::make_shared<LayerStack>(std::move(layers), std::move(ties));
}

class Mlp : public torch::nn::Module {
 public:
  Mlp(const Case& c, int64_t number) : dropout_(static_cast<double>(c.dropout) / 100), number_(number) {
    up_ = register_module("up", std::make_shared<nn::Linear>(width_of(c), c.ffn_width));
    down_ = register_module("down", std::make_shared<nn::Linear>(c.ffn_width, width_of(c)));
    freeze(c, number, *this);
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor y = down_->forward(nn::gelu(up_->forward(x)));
    return x + nn::dropout(y, dropout_, is_training(), static_cast<uint64_t>(number_));
  }

 private:
  double dropout_;
  int64_t number_;
  std::shared_ptr<nn::Linear> up_, down_;
};

// No stack: two units, parameters in no unit before, between and after them, and a buffer.
class Plain : public torch::nn::Module {
 public:
  explicit Plain(const Case& c) {
    input_ = register_module("input", std::make_shared<nn::Linear>(kFeatures, width_of(c)));
    first_ = register_module("first", unit<Mlp>(c, 0));
    scale_ = register_parameter("scale", at::zeros({width_of(c)}));
    gain_ = register_parameter("gain", at::zeros({}));
    second_ = register_module("second", unit<Mlp>(c, 1));
    output_ = register_module("output", std::make_shared<nn::Linear>(width_of(c), c.vocab));
    offset_ = register_buffer("offset", at::full({width_of(c)}, 0.1));
  }
  at::Tensor logits(const at::Tensor& x) {
    const at::Tensor y = first_->forward(input_->forward(x).tanh()) * scale_;
    return output_->forward(second_->forward(y * gain_ + offset_)).to(at::kFloat);
  }

 private:
  std::shared_ptr<nn::Linear> input_, output_;
  std::shared_ptr<Unit<Mlp>> first_, second_;
  at::Tensor scale_, gain_, offset_;
};

// Inputs and targets of a sample are a function of its number.
class Samples : public data::Dataset {
 public:
  Samples(const Case& c, int64_t size) : c_(c), size_(size) {}
  int64_t size() const override { return size_; }
  std::string fingerprint() const override { return "fuzz"; }
  data::Batch get(std::span<const int64_t> indices) const override {
    const auto n = static_cast<int64_t>(indices.size());
    const int64_t rows = c_.is_transformer() ? c_.length : kRows;
    data::Batch batch{{inputs(n), at::empty({n, rows}, at::kLong)}, n};
    for (int64_t i = 0; i < n; ++i) {
      fill(batch.tensors[0][i], static_cast<uint64_t>(indices[i]));
      auto* targets = batch.tensors[1][i].data_ptr<int64_t>();
      for (int64_t t = 0; t < rows; ++t) {
        const bool is_left_out = t > 0 && c_.model != kConv && integer(indices[i], t, 5, 2) == 0;
        targets[t] = is_left_out ? nn::kIgnore : integer(indices[i], t, c_.vocab, 1);
      }
    }
    return batch;
  }

 private:
  at::Tensor inputs(int64_t n) const {
    if (c_.is_transformer()) return at::empty({n, c_.length}, at::kLong);
    if (c_.model == kConv) return at::empty({n, kChannels, kImage, kImage});
    return at::empty({n, kRows, kFeatures});
  }
  void fill(const at::Tensor& sample, uint64_t index) const {
    if (c_.is_transformer()) {
      for (int64_t t = 0; t < sample.numel(); ++t)
        sample.data_ptr<int64_t>()[t] = integer(static_cast<int64_t>(index), t, c_.vocab, 0);
      return;
    }
    const uint64_t key = stream_key(static_cast<uint64_t>(c_.seed), "inputs");
    for (int64_t i = 0; i < sample.numel(); ++i)
      sample.data_ptr<float>()[i] = normal_at(key, index << 16 | static_cast<uint64_t>(i));
  }
  int64_t integer(int64_t index, int64_t place, int64_t below, uint64_t what) const {
    const uint64_t key = stream_key(static_cast<uint64_t>(c_.seed), static_cast<uint64_t>(index), what);
    return static_cast<int64_t>(philox4x32(key, static_cast<uint64_t>(place), 0)[0] % static_cast<uint64_t>(below));
  }

  Case c_;
  int64_t size_;
};

class FuzzTask : public train::Task {
 public:
  explicit FuzzTask(const Case& c) : c_(c) {}
  std::string name() const override { return "fuzz"; }

  std::shared_ptr<torch::nn::Module> make_model(const ModelParallel& parallel) override {
    if (c_.is_transformer()) return std::make_shared<gpt::Model>(gpt_config(), parallel);
    if (c_.model == kPlain) return std::make_shared<Plain>(c_);
    return make_stack(c_);
  }
  // No zeros and no ones: an element that is lost or counted twice shall show.
  void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed) override {
    const bool is_scale = parameter.dim() == 0 || name.ends_with("scale") || name.find("norm") != std::string::npos;
    nn::fill_normal(parameter, seed, name, parameter.dim() < 2 ? 0.1 : 0.4);
    if (is_scale) parameter.add_(1);
  }
  std::shared_ptr<const data::Dataset> training_data() override { return std::make_shared<Samples>(c_, kSamples); }
  std::shared_ptr<const data::Dataset> validation_data() override {
    return c_.validation ? std::make_shared<Samples>(c_, kValidationSamples) : nullptr;
  }
  int64_t count(const data::Batch& batch) override {
    if (c_.model == kConv) return batch.valid_samples;
    return batch.tensors[1].narrow(0, 0, batch.valid_samples).ne(nn::kIgnore).sum().item<int64_t>();
  }
  train::LossSum loss(torch::nn::Module& model, const data::Batch& batch) override {
    auto* plain = dynamic_cast<Plain*>(&model);
    if (!plain) return Task::loss(model, batch);
    const auto tensors = batch.valid_tensors();
    const at::Tensor logits = plain->logits(tensors[0]).view({-1, c_.vocab}), targets = tensors[1].reshape({-1});
    return {nn::cross_entropy_sum(logits, targets), logits.argmax(1).eq(targets).sum()};
  }
  std::unique_ptr<optim::Optimizer> make_optimizer(double weight_decay) override {
    if (c_.optimizer == 0) return optim::make_sgd({.momentum = 0.9, .weight_decay = weight_decay});
    return optim::make_adamw({.weight_decay = weight_decay});
  }

 private:
  gpt::Config gpt_config() const {
    return gpt::resolve({.family = c_.model == kGpt2 ? "gpt2" : "llama",
                         .layers = c_.layers,
                         .width = c_.heads * c_.head_dim,
                         .heads = c_.heads,
                         .kv_heads = c_.kv_heads,
                         .ffn_width = c_.ffn_width,
                         .vocab_size = c_.vocab,
                         .sequence_length = c_.length,
                         .tied_head = c_.tied != 0,
                         .dropout = static_cast<double>(c_.dropout) / 100,
                         .experts = c_.experts,
                         .experts_per_token = std::min<int64_t>(2, std::max<int64_t>(1, c_.experts))});
  }

  Case c_;
};

}  // namespace

std::unique_ptr<train::Task> make_task(const Case& c) { return std::make_unique<FuzzTask>(c); }

}  // namespace lockstep::fuzz
