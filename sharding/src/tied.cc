#include <algorithm>

#include <ATen/ops/empty.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/tied.h>

#include "add.h"

namespace lockstep {
namespace {

constexpr int kTag = 2;  // pipeline_runner has 0 and 1
constexpr int64_t kPieceElements = int64_t{1} << 22;

void check_gradient(const at::Tensor& gradient, const char* use) {
  LOCKSTEP_CHECK(gradient.defined() && gradient.is_contiguous() && gradient.scalar_type() == at::kFloat)
      << "the gradient of a tied parameter's " << use << " use must be there, contiguous f32";
}

// first + second, in this order on both stages.
void swap_and_add(ProcessGroup& pipeline, int peer, const at::Tensor& mine, bool is_first, Milliseconds timeout) {
  const at::Tensor flat = mine.view({-1});
  const at::Tensor scratch = at::empty({std::min(flat.numel(), kPieceElements)}, mine.options());
  for (int64_t begin = 0; begin < flat.numel(); begin += kPieceElements) {
    const int64_t n = std::min(kPieceElements, flat.numel() - begin);
    const at::Tensor piece = flat.narrow(0, begin, n), theirs = scratch.narrow(0, 0, n);
    Work sent = pipeline.send(piece, peer, kTag, timeout), received = pipeline.recv(theirs, peer, kTag, timeout);
    received.wait();
    sent.wait();  // before the piece changes
    is_first ? add_to(piece, piece, theirs) : add_to(piece, theirs, piece);
  }
}

}  // namespace

void sum_tied_gradients(ProcessGroup& pipeline, int first_stage, int second_stage, const at::Tensor& first,
                        const at::Tensor& second, Milliseconds timeout) {
  const bool has_first = pipeline.rank() == first_stage, has_second = pipeline.rank() == second_stage;
  if (has_first) check_gradient(first, "first");
  if (has_second) check_gradient(second, "second");
  if (has_first && has_second) {
    LOCKSTEP_CHECK(first.numel() == second.numel())
        << "a tied parameter's gradients have " << first.numel() << " and " << second.numel() << " elements";
    add_into(first, second);
  } else if (has_first) {
    swap_and_add(pipeline, second_stage, first, /*is_first=*/true, timeout);
  } else if (has_second) {
    swap_and_add(pipeline, first_stage, second, /*is_first=*/false, timeout);
  }
}

}  // namespace lockstep
