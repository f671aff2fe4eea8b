#include <algorithm>
#include <map>

#include <lockstep/base/error.h>
#include <lockstep/sharding/unit.h>

namespace lockstep {

void UnitBase::drop_storage(torch::nn::Module& layer) {
  if (!WithoutStorage::is_on()) return;
  for (const at::Tensor& parameter : layer.parameters()) {
    c10::StorageImpl* storage = parameter.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(at::DataPtr(nullptr, at::kCPU));
    storage->set_nbytes(0);
  }
}

std::vector<FoundUnit> find_units(torch::nn::Module& model) {
  std::vector<FoundUnit> units(1);  // the first is what lies in no unit
  std::map<std::string, size_t> unit_of_name;
  for (const auto& item : model.named_modules()) {
    const std::string& name = item.key();
    auto* unit = dynamic_cast<UnitBase*>(item.value().get());
    if (!unit || item.value()->parameters().empty()) continue;  // nothing to gather or to make again
    for (const auto& parameter : item.value()->named_parameters()) {
      const std::string full_name =
          name.empty() ? parameter.key() : std::string(name).append(".").append(parameter.key());
      if (!unit_of_name.emplace(full_name, units.size()).second) {
        throw ConfigError("unit " + name + " lies inside another unit: both would own " + full_name +
                          ". Mend: mark the outer or the inner one");
      }
    }
    units.push_back({name, unit, {}});
  }
  // Units do not nest: the least that holds two of them is the model.
  std::map<const void*, size_t> unit_of_tensor;
  const auto parameters = model.named_parameters();
  for (const auto& item : parameters) {
    const auto found = unit_of_name.find(item.key());
    const size_t unit = found == unit_of_name.end() ? 0 : found->second;
    const auto [known, is_new] = unit_of_tensor.try_emplace(item.value().unsafeGetTensorImpl(), unit);
    if (known->second != unit) known->second = 0;
  }
  for (const auto& item : parameters)
    units[unit_of_tensor.at(item.value().unsafeGetTensorImpl())].parameter_names.push_back(item.key());
  if (units[0].parameter_names.empty()) units.erase(units.begin());
  std::stable_partition(units.begin(), units.end(), [](const auto& unit) { return !unit.parameter_names.empty(); });
  return units;
}

}  // namespace lockstep
