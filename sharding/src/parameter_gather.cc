#include <ATen/ops/empty.h>

#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/sharding/parameter_gather.h>

#include "add.h"

namespace lockstep {
namespace {

std::vector<std::vector<int64_t>> shapes_of(const std::vector<at::Tensor>& tensors) {
  std::vector<std::vector<int64_t>> shapes;
  shapes.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) shapes.push_back(tensor.sizes().vec());
  return shapes;
}

}  // namespace

ParameterGather::ParameterGather(ProcessGroup& group, const std::vector<at::Tensor>& parameters, Milliseconds timeout)
    : group_(&group),
      layout_(shapes_of(parameters), group.size(), /*num_replicas=*/1),
      timeout_(timeout),
      options_(parameters[0].options().requires_grad(false)) {}

void ParameterGather::start_from(const std::vector<at::Tensor>& parameters) {
  const nn::MemoryScope memory(nn::MemoryKind::kScratch);
  packed_ = at::empty({layout_.numel()}, options_);
  const Piece own = layout_.pieces()[group_->rank()];
  for (size_t i = 0; i < parameters.size(); ++i) {
    for (const auto& [in_parameter, in_bucket, numel] : layout_.segments(i)) {
      if (in_bucket < own.offset || in_bucket >= own.offset + own.numel) continue;
      copy_run(packed_, in_bucket, parameters[i], in_parameter, numel);
    }
  }
  start_from_shard(packed_.narrow(0, own.offset, own.numel));
}

void ParameterGather::start_from_shard(const at::Tensor& flat_shard) {
  const nn::MemoryScope memory(nn::MemoryKind::kScratch);
  if (!packed_.defined()) packed_ = at::empty({layout_.numel()}, options_);
  std::vector<int64_t> counts;
  for (const Piece& piece : layout_.pieces()) counts.push_back(piece.numel);
  work_ = group_->all_gather_uneven(packed_, flat_shard, counts, timeout_);
}

void ParameterGather::finish(const std::vector<at::Tensor>& parameters, bool skip_own) {
  work_.wait();
  const Piece own = layout_.pieces()[group_->rank()];
  for (size_t i = 0; i < parameters.size(); ++i) {
    for (const auto& [in_parameter, in_bucket, numel] : layout_.segments(i)) {
      if (skip_own && in_bucket >= own.offset && in_bucket < own.offset + own.numel) continue;
      copy_run(parameters[i], in_parameter, packed_, in_bucket, numel);
    }
  }
  packed_.reset();
  work_ = Work();
}

}  // namespace lockstep
