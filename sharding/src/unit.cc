#include <set>

#include <ATen/native/Resize.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/unit.h>

namespace lockstep {
namespace {

thread_local bool t_without_storage = false;

}  // namespace

WithoutStorage::WithoutStorage() : was_(t_without_storage) { t_without_storage = true; }
WithoutStorage::~WithoutStorage() { t_without_storage = was_; }

void UnitBase::drop_storage(torch::nn::Module& layer) {
  if (!t_without_storage) return;
  for (const at::Tensor& parameter : layer.parameters())
    at::native::resize_bytes_cpu(parameter.storage().unsafeGetStorageImpl(), 0);
}

std::vector<FoundUnit> find_units(torch::nn::Module& model) {
  std::vector<FoundUnit> units;
  FoundUnit rest;
  std::set<std::string> taken;
  const auto consider = [&](const std::string& name, torch::nn::Module& module) {
    auto* unit = dynamic_cast<UnitBase*>(&module);
    if (!unit) return;
    FoundUnit found{name, unit, {}};
    for (const auto& item : module.named_parameters()) {
      found.parameter_names.push_back(name.empty() ? item.key() : name + "." + item.key());
      if (!taken.insert(found.parameter_names.back()).second) {
        throw ConfigError("unit " + name + " lies inside another unit: both would own " + found.parameter_names.back() +
                          ". Mend: mark the outer or the inner one");
      }
    }
    if (!found.parameter_names.empty()) units.push_back(std::move(found));  // nothing to gather or free
  };
  for (const auto& item : model.named_modules()) consider(item.key(), *item.value());
  for (const auto& item : model.named_parameters()) {
    if (!taken.contains(item.key())) rest.parameter_names.push_back(item.key());
  }
  if (!rest.parameter_names.empty()) units.insert(units.begin(), std::move(rest));
  return units;
}

}  // namespace lockstep
