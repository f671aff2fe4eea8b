#include <lockstep/train/task.h>

namespace lockstep::train {

bool Task::decays(const std::string&, const at::Tensor& parameter) { return parameter.dim() >= 2; }

std::unique_ptr<optim::Optimizer> Task::make_optimizer(double weight_decay) {
  return optim::make_adamw({.weight_decay = weight_decay});
}

}  // namespace lockstep::train
