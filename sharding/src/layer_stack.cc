#include <lockstep/base/error.h>
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
      built_[i] = register_module(layers_[i].name, layers_[i].make());
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

size_t LayerStack::chunk_of(const std::string& layer) const {
  for (size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
    for (size_t i = chunks_[chunk].begin; i < chunks_[chunk].end; ++i) {
      if (layers_[i].name == layer) return chunk;
    }
  }
  throw CheckFailed("layer " + layer + " is not one of this stage");
}

at::Tensor LayerStack::run(size_t chunk, at::Tensor x, const std::vector<at::Tensor>& batch) {
  LOCKSTEP_CHECK(chunk < chunks_.size()) << "chunk " << chunk << " of " << chunks_.size() << ": call build() first";
  for (size_t i = chunks_[chunk].begin; i < chunks_[chunk].end; ++i) x = (*built_[i])(x, batch);
  return x;
}

}  // namespace lockstep
