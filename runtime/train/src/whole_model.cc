#include "whole_model.h"

#include <set>

#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/sharding/layer_stack.h>

#include "parameter_table.h"

namespace lockstep::train {

std::shared_ptr<torch::nn::Module> load_whole_model(Fs& fs, Task& task, const std::string& run_dir) {
  auto model = task.make_model(ModelParallel{});
  std::set<std::string> second_uses;
  std::set<const void*> seen;  // one tensor under two names is saved under the first
  if (auto* stack = dynamic_cast<LayerStack*>(model.get())) {
    stack->build();
    for (const Tie& tie : stack->ties()) second_uses.insert(tie.second);
  }
  std::vector<checkpoint::StateTensor> state;
  const auto add = [&](const std::string& section, const std::string& name, const at::Tensor& tensor) {
    const auto dtype = checkpoint::dtype_name(tensor.scalar_type());
    const at::Tensor stored =
        section == "weights" ? tensor.detach().view(stored_shape(tensor.sizes())) : tensor.detach();
    state.push_back({section, ShardLayout::replicated(name, stored.sizes().vec(), dtype, 1), stored});
  };
  for (const auto& item : model->named_parameters()) {
    if (!second_uses.contains(item.key()) && seen.insert(item.value().unsafeGetTensorImpl()).second)
      add("weights", item.key(), item.value());
  }
  for (const auto& item : model->named_buffers()) add("buffers", item.key(), item.value());
  const auto alone = std::move(make_local_world(1)[0]);
  checkpoint::Store(fs, *alone, {.run_dir = run_dir}).load(run_dir, state, /*weights_only=*/true);
  return model;
}

}  // namespace lockstep::train
