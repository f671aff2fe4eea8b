#include "ordered_fold.h"

#include <algorithm>
#include <cstring>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <lockstep/base/error.h>

namespace lockstep {
namespace {

constexpr int64_t kTile = 2048;  // elements folded at a time, so that partial sums stay in the first-level cache

template <ReduceOp kOp, typename T>
T combined(T a, T b) {
  if constexpr (kOp == ReduceOp::kSum) return static_cast<T>(a + b);
  if constexpr (kOp == ReduceOp::kMax) return a < b ? b : a;
  return b < a ? b : a;
}

template <ReduceOp kOp, typename T>
void fold_typed(const FoldPlan& plan, std::span<const std::byte* const> terms, T* out, int64_t numel) {
  thread_local std::vector<std::byte> scratch;
  if (plan.steps().size() > 1) scratch.resize(plan.num_partials() * kTile * sizeof(T));
  auto* partials = reinterpret_cast<T*>(scratch.data());
  const auto operand = [&](int which, int64_t start) -> const T* {
    return which >= 0 ? reinterpret_cast<const T*>(terms[which]) + start : partials + ~which * kTile;
  };
  for (int64_t start = 0; start < numel; start += kTile) {
    const int64_t n = std::min(kTile, numel - start);
    for (size_t step = 0; step < plan.steps().size(); ++step) {
      const auto& [left_term, right_term, sum_place] = plan.steps()[step];
      const T *left = operand(left_term, start), *right = operand(right_term, start);
      T* sum = step + 1 == plan.steps().size() ? out + start : partials + ~sum_place * kTile;
#pragma GCC ivdep  // where `sum` is a term, it is the same element of it
      for (int64_t i = 0; i < n; ++i) sum[i] = combined<kOp>(left[i], right[i]);
    }
  }
}

template <typename T>
void fold_op(const FoldPlan& plan, ReduceOp op, std::span<const std::byte* const> terms, std::byte* out,
             int64_t numel) {
  auto* typed = reinterpret_cast<T*>(out);
  if (op == ReduceOp::kSum) return fold_typed<ReduceOp::kSum>(plan, terms, typed, numel);
  if (op == ReduceOp::kMax) return fold_typed<ReduceOp::kMax>(plan, terms, typed, numel);
  fold_typed<ReduceOp::kMin>(plan, terms, typed, numel);
}

}  // namespace

FoldPlan::FoldPlan(std::span<const LeafBlock> blocks) : num_terms_(blocks.size()) {
  struct Entry {
    LeafBlock block;
    int operand;
  };
  std::vector<Entry> counter;
  const auto merge_last_two = [&] {
    const Entry right = counter.back();
    counter.pop_back();
    const int place = static_cast<int>(counter.size()) - 1;
    steps_.push_back({counter.back().operand, right.operand, ~place});
    num_partials_ = std::max(num_partials_, counter.size());
    counter.back().operand = ~place;
    counter.back().block.size += right.block.size;
  };
  for (size_t i = 0; i < blocks.size(); ++i) {
    counter.push_back({blocks[i], static_cast<int>(i)});
    while (counter.size() > 1) {
      const LeafBlock &left = counter[counter.size() - 2].block, &right = counter.back().block;
      if (left.size != right.size || left.start % (2 * left.size) != 0) break;
      merge_last_two();
    }
  }
  while (counter.size() > 1) merge_last_two();
}

FoldPlan FoldPlan::of_leaves(int64_t n) {
  std::vector<LeafBlock> leaves;
  for (int64_t leaf = 0; leaf < n; ++leaf) leaves.push_back({leaf, 1});
  return FoldPlan(leaves);
}

void fold(const FoldPlan& plan, at::ScalarType dtype, ReduceOp op, std::span<const std::byte* const> terms,
          std::byte* out, int64_t numel) {
  if (numel == 0) return;
  if (terms.size() == 1) {
    if (out != terms[0]) std::memcpy(out, terms[0], numel * c10::elementSize(dtype));
    return;
  }
  switch (dtype) {
    case at::kFloat:
      return fold_op<float>(plan, op, terms, out, numel);
    case at::kDouble:
      return fold_op<double>(plan, op, terms, out, numel);
    case at::kBFloat16:
      return fold_op<c10::BFloat16>(plan, op, terms, out, numel);
    case at::kHalf:
      return fold_op<c10::Half>(plan, op, terms, out, numel);
    case at::kInt:
      return fold_op<int32_t>(plan, op, terms, out, numel);
    case at::kLong:
      return fold_op<int64_t>(plan, op, terms, out, numel);
    case at::kByte:
      return fold_op<uint8_t>(plan, op, terms, out, numel);
    default:
      throw CheckFailed(std::string("no reduction for dtype ") + at::toString(dtype));
  }
}

}  // namespace lockstep
