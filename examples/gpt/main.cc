// Trains a GPT-2 or Llama-style language model on token files. What is here: the model, the data, the loss. Ranks,
// precision, reduction, checkpoints and metrics are the Trainer's.
#include <algorithm>
#include <iostream>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/data/token_dataset.h>
#include <lockstep/train/flags.h>
#include <lockstep/train/trainer.h>

#include "flags.h"
#include "model.h"

namespace gpt {
namespace {

using lockstep::data::Batch;
using lockstep::data::Dataset;

// Before training: a sample that cannot be drawn after it would come too late.
void check_sample(const Flags& flags) {
  const auto require = [](bool ok, const std::string& message) {
    if (!ok) throw lockstep::ConfigError(message);
  };
  require(flags.generate_tokens >= 0, "--generate_tokens must not be negative");
  if (flags.generate_tokens == 0) return;
  require(flags.top_k > 0, "--top_k=" + std::to_string(flags.top_k) + " must be positive");
  require(flags.temperature >= 0, "--temperature must be a number, not negative");
  for (const unsigned char letter : flags.prompt) {
    require(letter < flags.model.vocab_size,
            "--prompt has the byte " + std::to_string(letter) + ", which is no token of --vocab_size=" +
                std::to_string(flags.model.vocab_size) + ". Mend: leave it out: this program's prompts are bytes");
  }
}

class LanguageModel : public lockstep::train::Task {
 public:
  explicit LanguageModel(Flags flags) : flags_(std::move(flags)) {
    flags_.model = resolve(flags_.model);
    check_sample(flags_);
  }

  std::string name() const override { return "gpt"; }
  std::shared_ptr<torch::nn::Module> make_model(const lockstep::ModelParallel& parallel) override {
    return std::make_shared<Model>(flags_.model, parallel);
  }
  void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed) override {
    gpt::initialize(flags_.model, name, parameter, seed);
  }

  std::shared_ptr<const Dataset> training_data() override { return open(lockstep::train::train_data_flag()); }
  std::shared_ptr<const Dataset> validation_data() override {
    const std::string files = lockstep::train::validation_data_flag();
    return files.empty() ? nullptr : open(files);
  }

  int64_t count(const Batch& batch) override { return batch.valid_samples * flags_.model.sequence_length; }
  const char* count_unit() const override { return "tokens"; }

  bool wants_finished_model() const override { return flags_.generate_tokens > 0; }
  void finished(torch::nn::Module& model) override {
    // Bytes are their own text. Other tokenizers' ids are printed as they are: the program does not know their words.
    std::vector<int64_t> prompt;
    for (const unsigned char letter : flags_.prompt.empty() ? std::string("\n") : flags_.prompt)
      prompt.push_back(std::min<int64_t>(letter, flags_.model.vocab_size - 1));
    const auto tokens = generate(dynamic_cast<Model&>(model), prompt, flags_.generate_tokens, flags_.temperature,
                                 flags_.top_k, flags_.seed);
    std::cout << "\n--- a sample ---\n";
    for (const int64_t token : tokens) {
      if (flags_.model.vocab_size <= 256)
        std::cout << static_cast<char>(token);
      else
        std::cout << token << ' ';
    }
    std::cout << "\n----------------\n" << std::flush;
  }

  std::string config_json() const override {
    const Config& c = flags_.model;
    nlohmann::ordered_json config = {{"model", c.family},          {"layers", c.layers},
                                     {"width", c.width},           {"heads", c.heads},
                                     {"kv_heads", c.kv_heads},     {"ffn_width", c.ffn_width},
                                     {"vocab_size", c.vocab_size}, {"sequence_length", c.sequence_length},
                                     {"tied_head", c.tied_head},   {"dropout", c.dropout}};
    // Where they are the usual ones, runs of before these flags go on.
    const Config usual;
    if (c.norm_epsilon != usual.norm_epsilon) config["norm_epsilon"] = c.norm_epsilon;
    if (c.rope_theta != usual.rope_theta) config["rope_theta"] = c.rope_theta;
    if (c.experts > 0) {
      config["experts"] = c.experts;
      config["experts_per_token"] = c.experts_per_token;
      config["moe_aux_weight"] = c.moe_aux_weight;
    }
    return config.dump();
  }

 private:
  std::shared_ptr<const Dataset> open(const std::string& files) const {
    return lockstep::data::open_token_dataset(
        files, {.sequence_length = flags_.model.sequence_length, .vocab_size = flags_.model.vocab_size});
  }

  Flags flags_;
};

}  // namespace
}  // namespace gpt

int main(int argc, char** argv) {
  return lockstep::train::run_training(argc, argv, "trains a GPT-2 or Llama-style language model on token files",
                                       gpt::flags_file(),
                                       [] { return std::make_unique<gpt::LanguageModel>(gpt::flags()); });
}
