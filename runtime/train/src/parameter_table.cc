#include "parameter_table.h"

#include <algorithm>
#include <map>
#include <set>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/checkpoint/checkpoint.h>

namespace lockstep::train {

using nlohmann::json;

std::vector<int64_t> stored_shape(at::IntArrayRef shape) {
  return shape.empty() ? std::vector<int64_t>{1} : shape.vec();
}

ParameterTable::ParameterTable(torch::nn::Module& model, const Mesh& mesh, const TensorParallel& tensor) {
  units_ = find_units(model);
  std::erase_if(units_, [](const FoundUnit& unit) { return unit.parameter_names.empty(); });  // the last ones
  find_locals(model, tensor);
  find_ties(dynamic_cast<LayerStack*>(&model));
  for (size_t i = 0; i < locals_.size(); ++i) {
    if (locals_[i].is_trainable) trainable_.push_back(i);
  }
  find_globals(model, mesh);
}

void ParameterTable::find_locals(torch::nn::Module& model, const TensorParallel& tensor) {
  std::map<std::string, ParameterPlacement> placement_of;
  for (auto& placement : placements(model, tensor)) placement_of[placement.name] = std::move(placement);
  std::map<std::string, size_t> unit_of;
  for (size_t unit = 0; unit < units_.size(); ++unit) {
    for (const auto& name : units_[unit].parameter_names) unit_of[name] = unit;
  }
  std::set<const void*> seen;  // one tensor under two names is one parameter
  for (const auto& item : model.named_parameters()) {
    if (!seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    locals_.push_back({.name = item.key(),
                       .own_name = item.key(),
                       .tensor = item.value(),
                       .is_trainable = item.value().requires_grad(),
                       .unit = unit_of.at(item.key()),
                       .placement = placement_of.at(item.key())});
  }
  std::vector<size_t> sizes(units_.size(), 0);
  for (auto& local : locals_) local.place_in_unit = sizes[local.unit]++;
}

void ParameterTable::find_ties(const LayerStack* stack) {
  if (!stack) return;
  const auto find = [&](const std::string& name) {
    return std::find_if(locals_.begin(), locals_.end(), [&](const auto& local) { return local.name == name; });
  };
  for (const auto& [first_name, second_name] : stack->ties()) {
    const auto first = find(first_name), second = find(second_name);
    if (second != locals_.end()) second->own_name = first_name;
    if (first != locals_.end() && second != locals_.end()) {
      second->first_use = first - locals_.begin();
    } else if (first != locals_.end() || second != locals_.end()) {
      (first != locals_.end() ? first : second)->is_tied_away = true;
    }
  }
}

const std::vector<int>& ParameterTable::stages_of(const std::string& own_name) const {
  const auto found =
      std::find_if(globals_.begin(), globals_.end(), [&](const auto& global) { return global.name == own_name; });
  LOCKSTEP_CHECK(found != globals_.end()) << own_name << " is no parameter";
  return found->stages;
}

std::vector<std::vector<size_t>> ParameterTable::trainable_by_unit() const {
  std::vector<std::vector<size_t>> by_unit(units_.size());
  for (size_t k = 0; k < trainable_.size(); ++k) by_unit[locals_[trainable_[k]].unit].push_back(k);
  return by_unit;
}

// Each stage tells what it has; the list of all, in order of the stages, is the same everywhere.
void ParameterTable::find_globals(torch::nn::Module& model, const Mesh& mesh) {
  json mine = json::array();
  for (size_t i = 0; i < locals_.size(); ++i) {
    const ModelParameter& local = locals_[i];
    if (local.first_use >= 0) continue;
    json parts = json::array();
    for (const Part& part : local.placement.parts) parts.push_back({part.begin, part.size});
    mine.push_back({local.own_name, stored_shape(local.placement.shape),
                    checkpoint::dtype_name(local.tensor.scalar_type()), false, local.is_trainable, i,
                    local.placement.tensor_dim, parts, local.placement.is_of_experts()});
  }
  for (const auto& item : model.named_buffers()) {
    mine.push_back({item.key(), item.value().sizes().vec(), checkpoint::dtype_name(item.value().scalar_type()), true,
                    false, buffers_.size(), -1, json::array(), false});
    buffers_.push_back(item.value());
  }
  const auto texts = all_gather_text(mesh.pipeline(), mine.dump());
  std::map<std::string, size_t> known;
  for (int stage = 0; stage < mesh.pipeline().size(); ++stage) {
    for (const json& entry : json::parse(texts[stage])) {
      const auto [place, is_new] = known.try_emplace(entry[0], globals_.size());
      if (is_new) {
        globals_.push_back({.name = entry[0],
                            .shape = entry[1],
                            .tensor_dim = entry[6],
                            .parts = {},
                            .is_of_experts = entry[8],
                            .dtype = entry[2],
                            .is_buffer = entry[3],
                            .is_trainable = entry[4]});
        for (const json& part : entry[7]) globals_.back().parts.push_back({part[0], part[1]});
      }
      GlobalTensor& global = globals_[place->second];
      global.stages.push_back(stage);
      if (stage == mesh.pipeline().rank()) global.local = entry[5];
    }
  }
}

}  // namespace lockstep::train
