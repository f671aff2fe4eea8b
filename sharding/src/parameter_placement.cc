#include <algorithm>
#include <numeric>

#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/init.h>
#include <lockstep/sharding/parameter_placement.h>
#include <lockstep/sharding/tensor_parallel.h>

namespace lockstep {
namespace {

// The placement of a module's own parameter, complete and checked against the tensor it has.
ParameterPlacement placed(const torch::nn::Module& module, const std::string& own_name, const std::string& name,
                          const at::Tensor& parameter, const TensorParallel& tp) {
  const auto* const declares = dynamic_cast<const Placed*>(&module);
  ParameterPlacement placement;
  if (declares) {
    placement = declares->placement(own_name);
  } else {
    placement.shape = parameter.sizes().vec();
    placement.is_partial = tp.is_sequence_parallel();
  }
  placement.name = name;
  placement.rank = tp.rank();
  const std::vector<int64_t> declared = placement.box().sizes, actual = parameter.sizes().vec();
  LOCKSTEP_CHECK(declared == actual) << name << " is " << parameter.sizes() << ", but its module declares "
                                     << at::IntArrayRef(declared) << " of " << at::IntArrayRef(placement.shape)
                                     << " on rank " << tp.rank() << " of " << tp.size();
  return placement;
}

// The ranks that sum a partial gradient with `rank`, in order.
std::vector<int> holders(const ParameterPlacement& placement, int size) {
  std::vector<int> all;
  for (int rank = 0; rank < size; ++rank) {
    if (placement.part(rank) == placement.part()) all.push_back(rank);
  }
  return all;
}

}  // namespace

std::vector<Part> even_parts(int64_t total, int count) {
  if (total < count) {
    throw ConfigError("a dim of " + std::to_string(total) + " can not be cut for " + std::to_string(count) +
                      " ranks; make it at least as many, or set --tensor_parallel_size=" +
                      std::to_string(std::max<int64_t>(total, 1)));
  }
  std::vector<Part> parts;
  int64_t next = 0;
  for (int i = 0; i < count; ++i) {
    parts.push_back({next, total / count + (i < total % count ? 1 : 0)});
    next += parts.back().size;
  }
  return parts;
}

std::vector<Part> scaled(std::vector<Part> parts, int64_t factor) {
  for (Part& part : parts) part = {part.begin * factor, part.size * factor};
  return parts;
}

Part ParameterPlacement::part(int tensor_rank) const {
  return tensor_dim < 0 ? Part{} : parts.at(static_cast<size_t>(is_of_experts() ? expert_rank : tensor_rank));
}

Box ParameterPlacement::box(int tensor_rank) const {
  Box box = Box::whole(shape);
  if (tensor_dim < 0) return box;
  box.offsets[tensor_dim] = part(tensor_rank).begin;
  box.sizes[tensor_dim] = part(tensor_rank).size;
  return box;
}

bool ParameterPlacement::is_first_holder() const {
  for (int before = 0; before < rank; ++before) {
    if (part(before) == part()) return false;
  }
  return true;
}

std::vector<ParameterPlacement> placements(const torch::nn::Module& model, const TensorParallel& tp) {
  std::vector<ParameterPlacement> all;
  for (const auto& item : model.named_parameters()) {
    const std::string& name = item.key();
    const torch::nn::Module* owner = &model;
    size_t begin = 0;
    for (size_t dot = name.find('.'); dot != std::string::npos; dot = name.find('.', begin)) {
      owner = owner->named_children()[name.substr(begin, dot - begin)].get();
      begin = dot + 1;
    }
    all.push_back(placed(*owner, name.substr(begin), name, item.value(), tp));
  }
  return all;
}

ShardLayout shard_layout(const ParameterPlacement& placement, std::string dtype, const MeshShape& mesh,
                         int pipeline_stage) {
  ShardLayout layout{placement.name, placement.shape, std::move(dtype), {}};
  const int stage_size = mesh.data * mesh.context * mesh.tensor;
  for (int rank = 0; rank < mesh.pipeline * stage_size; ++rank) {
    ParameterPlacement there = placement;
    if (placement.is_of_experts()) there.expert_rank = rank % stage_size / (mesh.context * mesh.tensor) % mesh.expert;
    Box box = there.box(rank % mesh.tensor);  // the tensor axis is the fastest
    if (pipeline_stage >= 0 && rank / stage_size != pipeline_stage)
      std::fill(box.sizes.begin(), box.sizes.end(), 0), std::fill(box.offsets.begin(), box.offsets.end(), 0);
    layout.boxes.push_back(std::move(box));
  }
  return layout;
}

void fill_part(const at::Tensor& parameter, const ParameterPlacement& placement,
               const std::function<void(const at::Tensor&)>& fill, int64_t first_row) {
  std::vector<int64_t> offsets = placement.box().offsets;
  if (!offsets.empty()) offsets[0] += first_row;
  nn::fill_box(parameter, placement.shape, offsets, fill);
}

void reduce_partial_gradients(const std::vector<ParameterPlacement>& placements,
                              const std::vector<at::Tensor>& gradients, const TensorParallel& tp) {
  LOCKSTEP_CHECK(placements.size() == gradients.size())
      << gradients.size() << " gradients for " << placements.size() << " parameters";
  if (!tp.is_parallel()) return;

  std::vector<at::Tensor> mine;
  std::vector<int64_t> counts(tp.size(), 0);
  for (size_t i = 0; i < placements.size(); ++i) {
    if (!placements[i].is_partial) continue;
    LOCKSTEP_CHECK(gradients[i].defined() && gradients[i].scalar_type() == at::kFloat)
        << placements[i].name << " has no f32 gradient to sum over the tensor group";
    mine.push_back(gradients[i].reshape({-1}));
    for (int rank = 0; rank < tp.size(); ++rank) counts[rank] += placements[i].box(rank).numel();
  }
  if (mine.empty()) return;
  const at::Tensor packed = at::cat(mine);
  at::Tensor all = at::empty({std::accumulate(counts.begin(), counts.end(), int64_t{0})}, packed.options());
  tp.group->all_gather_uneven(all, packed, counts, tp.timeout).wait();
  std::vector<at::Tensor> of_rank = all.split_with_sizes(counts);

  std::vector<int64_t> next(tp.size(), 0);
  for (size_t i = 0; i < placements.size(); ++i) {
    if (!placements[i].is_partial) continue;
    at::Tensor sum;
    for (const int rank : holders(placements[i], tp.size())) {
      const at::Tensor term = of_rank[rank].narrow(0, next[rank], gradients[i].numel());
      sum = sum.defined() ? sum.add_(term) : term.clone();
    }
    gradients[i].copy_(sum.view(gradients[i].sizes()));
    for (int rank = 0; rank < tp.size(); ++rank) next[rank] += placements[i].box(rank).numel();
  }
}

}  // namespace lockstep
