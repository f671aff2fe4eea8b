#include <algorithm>
#include <optional>

#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/sharding/layer_stack.h>

namespace lockstep {

LayerStack::LayerStack(std::vector<Layer> layers, std::vector<Tie> ties)
    : layers_(std::move(layers)), ties_(std::move(ties)), built_(layers_.size()) {}

std::vector<double> LayerStack::costs() const {
  std::vector<double> costs;
  for (const Layer& layer : layers_) costs.push_back(layer.cost);
  return costs;
}

void LayerStack::build(const std::vector<Range>& chunks) {
  LOCKSTEP_CHECK(chunks_.empty()) << "a stack is built once";
  chunks_ = chunks;
  for (const auto& [begin, end] : chunks_) {
    LOCKSTEP_CHECK(begin <= end && end <= layers_.size())
        << "layers [" << begin << ", " << end << ") of " << layers_.size();
    for (size_t i = begin; i < end; ++i) {
      built_[i] = register_module(layers_[i].name, make(layers_[i]));
      UnitBase::drop_storage(*built_[i]);
    }
  }
  const auto parameters = named_parameters();
  for (const auto& [first, second] : ties_) {
    const at::Tensor *one = parameters.find(first), *two = parameters.find(second);
    if (!one || !two) continue;
    LOCKSTEP_CHECK(one->sizes() == two->sizes()) << first << " and " << second << " are tied and differ in shape";
    at::Tensor(*two).set_data(one->detach());
  }
}

// A second use on the first one's stage gets the first one's memory.
std::shared_ptr<StackLayer> LayerStack::make(const Layer& layer) {
  const bool has_second_use = std::any_of(ties_.begin(), ties_.end(), [&](const Tie& tie) {
    return tie.second.starts_with(layer.name + ".") && named_parameters().contains(tie.first);
  });
  std::optional<WithoutStorage> without_storage;
  if (has_second_use) without_storage.emplace();
  return layer.make();
}

size_t LayerStack::chunk_of(const std::string& layer) const {
  for (size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
    for (size_t i = chunks_[chunk].begin; i < chunks_[chunk].end; ++i) {
      if (layers_[i].name == layer) return chunk;
    }
  }
  throw CheckFailed("layer " + layer + " is not one of this stage");
}

// Random numbers go by a layer's place in the model and by how often it ran, not by the stage that it is on.
at::Tensor LayerStack::run(size_t chunk, at::Tensor x, const std::vector<at::Tensor>& batch) {
  LOCKSTEP_CHECK(chunk < chunks_.size()) << "chunk " << chunk << " of " << chunks_.size() << ": call build() first";
  constexpr uint64_t kPartsOfRun = uint64_t{1} << 32, kPartsOfLayer = 4;
  const uint64_t first_part = (nn::step_key().part / kPartsOfRun + 1) * kPartsOfRun;
  for (size_t i = chunks_[chunk].begin; i < chunks_[chunk].end; ++i) {
    nn::begin_part(first_part + kPartsOfLayer * i);
    x = (*built_[i])(x, batch);
  }
  nn::begin_part(first_part + kPartsOfLayer * layers_.size());
  return x;
}

namespace {

struct StageIsDone {};  // thrown through the code that called forward(), where other stages go on

}  // namespace

at::Tensor LayerStack::run_stage(size_t chunk, at::Tensor x, bool is_last, const std::function<void()>& whole) {
  stage_ = Stage{chunk, std::move(x), is_last, {}};
  const std::unique_ptr<LayerStack, void (*)(LayerStack*)> end(this, [](LayerStack* stack) { stack->stage_.reset(); });
  try {
    whole();
  } catch (const StageIsDone&) {
  }
  if (!stage_->output) {
    throw ConfigError(
        "the task's loss does not call the model's forward, so no pipeline can compute it. Mend: call forward() once a "
        "micro-batch, or --pipeline_parallel_size=1");
  }
  return *stage_->output;
}

at::Tensor LayerStack::forward(const std::vector<at::Tensor>& batch) {
  if (!stage_) return run(0, {}, batch);
  if (stage_->output) {
    throw ConfigError(
        "the task's loss calls the model's forward twice in a micro-batch, so no pipeline can compute it. Mend: call "
        "it once, or --pipeline_parallel_size=1");
  }
  stage_->output = run(stage_->chunk, std::move(stage_->x), batch);
  if (!stage_->is_last) throw StageIsDone();
  return *stage_->output;
}

}  // namespace lockstep
