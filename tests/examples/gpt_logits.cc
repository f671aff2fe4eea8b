// gpt_logits CHECKPOINT PROMPTS OUT, with the model flags of gpt: what the model of a checkpoint answers, for tests to
// compare. PROMPTS holds token ids, a prompt a line; OUT gets the logits [tokens, vocabulary] of each as bare f32.
#include <fstream>
#include <iostream>
#include <sstream>

#include <gflags/gflags.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/train/task.h>

#include "flags.h"
#include "whole_model.h"

namespace {

using namespace lockstep;

// The example's model, without its data: only what loading one needs.
class JustTheModel : public train::Task {
 public:
  std::string name() const override { return "gpt"; }
  std::shared_ptr<torch::nn::Module> make_model(const ModelParallel& parallel) override {
    return std::make_shared<gpt::Model>(gpt::resolve(gpt::flags().model), parallel);
  }
  void initialize(const std::string&, const at::Tensor&, uint64_t) override {}
  std::shared_ptr<const data::Dataset> training_data() override { return nullptr; }
  int64_t count(const data::Batch&) override { return 0; }
};

void write_logits(const std::string& checkpoint, const std::string& prompts, const std::string& out) {
  const torch::NoGradGuard no_grad;
  JustTheModel task;
  const auto module = train::load_whole_model(real_fs(), task, checkpoint);
  auto& model = dynamic_cast<gpt::Model&>(*module);
  model.eval();
  std::ifstream lines(prompts);
  std::ofstream file(out, std::ios::binary);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    const std::vector<int64_t> tokens{std::istream_iterator<int64_t>(words), {}};
    const auto length = static_cast<int64_t>(tokens.size());
    const at::Tensor logits = model.forward({torch::tensor(tokens).view({1, length})}).contiguous();
    LOCKSTEP_CHECK(logits.scalar_type() == at::kFloat) << "logits are " << logits.scalar_type();
    file.write(static_cast<const char*>(logits.const_data_ptr()), static_cast<std::streamsize>(logits.nbytes()));
  }
  LOCKSTEP_CHECK(file.flush()) << "cannot write " << out;
}

}  // namespace

int main(int argc, char** argv) {
  gflags::ParseCommandLineFlags(&argc, &argv, /*remove_flags=*/true);
  try {
    LOCKSTEP_CHECK(argc == 4) << "usage: gpt_logits CHECKPOINT PROMPTS OUT --model=...";
    write_logits(argv[1], argv[2], argv[3]);
    return 0;
  } catch (...) {
    const auto failure = lockstep::describe_current_exception();
    std::cerr << failure.message << "\n";
    return static_cast<int>(failure.code);
  }
}
