#include <lockstep/base/error.h>
#include <lockstep/sharding/layer_stack.h>
#include <lockstep/train/task.h>

namespace lockstep::train {

std::shared_ptr<torch::nn::Module> Task::make_model() {
  throw CheckFailed("task " + name() + " makes no model: override make_model()");
}

std::shared_ptr<torch::nn::Module> Task::make_model(const ModelParallel& parallel) {
  if (parallel.is_parallel()) {
    throw ConfigError(
        "the model of task " + name() +
        " has no layers that could be cut over ranks. Mend: --tensor_parallel_size=1 "
        "--context_parallel_size=1 --expert_parallel_size=1, or override make_model(const ModelParallel&)");
  }
  return make_model();
}

LossSum Task::loss(torch::nn::Module& model, const data::Batch& batch) {
  auto* stack = dynamic_cast<LayerStack*>(&model);
  LOCKSTEP_CHECK(stack) << "task " << name() << " has a model that is no LayerStack, so it must say what its loss is";
  return {stack->forward(batch.valid_tensors()), {}};
}

bool Task::decays(const std::string&, const at::Tensor& parameter) { return parameter.dim() >= 2; }

std::unique_ptr<optim::Optimizer> Task::make_optimizer(double weight_decay) {
  return optim::make_adamw({.weight_decay = weight_decay});
}

}  // namespace lockstep::train
