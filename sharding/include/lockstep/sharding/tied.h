#pragma once

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// One parameter used in two places of the model, e.g. token embedding and output head: a copy on the stage of each
/// use. Each use is an autograd leaf of its own with a reduction of its own, also when both are on one stage, or the
/// cut would show in the bits (micro-batches are summed before uses, in every layout). After that the two sums meet
/// here, and both stages make the same update.
///
/// Replaces the reduced gradient of each stage's use by first + second (on one stage: that of the first). In the norm
/// the sum counts once: leave the second use out, and take the first one's squares after this call.
/// @param pipeline group of all stages; those that hold no use need not call.
/// @param first, second gradients of the first and second use in forward order; defined where this rank is the use's
/// stage. f32, contiguous, equal numel (whole, or the same shard on both sides).
/// Cost: numel x 4 bytes sent each way; scratch of at most 16 MiB.
void sum_tied_gradients(ProcessGroup& pipeline, int first_stage, int second_stage, const at::Tensor& first,
                        const at::Tensor& second, Milliseconds timeout = ProcessGroup::kDefaultTimeout);

}  // namespace lockstep
