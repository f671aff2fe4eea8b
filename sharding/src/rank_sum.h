#pragma once

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// The sum of `tensor` over ranks, taken in f32 in rank order and rounded once: the same bits on every rank and back
/// end. No arithmetic by the back end. `tensor` is left alone. Collective.
at::Tensor sum_over_ranks(ProcessGroup& group, const at::Tensor& tensor, Milliseconds timeout);
/// `pieces` [p, ...]: the sum over ranks of everybody's piece for this rank, as above.
at::Tensor sum_scattered(ProcessGroup& group, const at::Tensor& pieces, Milliseconds timeout);
/// [p, ...]: each rank's `tensor`.
at::Tensor gather_ranks(ProcessGroup& group, const at::Tensor& tensor, Milliseconds timeout);

}  // namespace lockstep
