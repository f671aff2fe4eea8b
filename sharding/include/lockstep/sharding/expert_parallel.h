#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/metrics/trace.h>

namespace lockstep {

/// The ranks that share the experts of a mixture (mixture_of_experts.h): neighbours on the data axis, each with
/// experts of its own and micro-batches of its own. A null group, or one of size 1: every rank has all experts.
///
/// In lockstep: all ranks of the group run their micro-batches of the same number together, forward and backward,
/// because each runs its experts for the tokens of all. The group must outlive graphs made with it and is used by one
/// thread at a time.
struct ExpertParallel {
  ProcessGroup* group = nullptr;
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
  metrics::TraceTrack track{};  ///< has a span for each exchange

  int size() const { return group ? group->size() : 1; }
  int rank() const { return group ? group->rank() : 0; }
};

/// Rows to other ranks, in the order of ranks: send[q] of `rows` [n, C] to rank q; what comes is receive[q] rows from
/// each. Backward sends the gradients the way back. Collective, in backward too.
/// Cost: the bytes of the rows for other ranks, each way.
at::Tensor exchange_rows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                         const ExpertParallel& ep);

}  // namespace lockstep
