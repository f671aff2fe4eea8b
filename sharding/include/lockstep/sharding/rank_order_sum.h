#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// Replaces each tensor by its sum over `ranks` of the group, taken in that order: the same bits on all of them. One
/// exchange for all. Collective: every rank of the group calls, with as many elements in all.
/// @param tensors f32, contiguous. Cost: (p-1) x bytes sent, p x bytes of scratch.
void sum_in_rank_order(ProcessGroup& group, const std::vector<int>& ranks, const std::vector<at::Tensor>& tensors,
                       Milliseconds timeout = ProcessGroup::kDefaultTimeout);

}  // namespace lockstep
