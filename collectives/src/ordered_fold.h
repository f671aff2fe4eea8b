#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <c10/core/ScalarType.h>

#include <lockstep/collectives/ordered_reduction.h>

namespace lockstep {

/// The additions of a binary counter that terms are pushed into from left to right, folded from small to large at the
/// end: the canonical tree over blocks that tile 0 .. n.
///
/// Operand: >= 0 is a term, < 0 a partial sum: ~operand is its place in the counter.
class FoldPlan {
 public:
  struct Step {
    int left, right, sum;
  };
  explicit FoldPlan(std::span<const LeafBlock> blocks);
  static FoldPlan of_leaves(int64_t n);  ///< one block a leaf
  size_t num_terms() const { return num_terms_; }
  size_t num_partials() const { return num_partials_; }
  std::span<const Step> steps() const { return steps_; }

 private:
  size_t num_terms_, num_partials_ = 0;
  std::vector<Step> steps_;
};

/// The sum (max, min) of `terms` of `numel` elements each into `out`, which may be one of them; no other is written.
/// Sixteen-bit floats are added in f32 and rounded each time.
void fold(const FoldPlan& plan, at::ScalarType dtype, ReduceOp op, std::span<const std::byte* const> terms,
          std::byte* out, int64_t numel);

}  // namespace lockstep
