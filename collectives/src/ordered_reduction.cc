#include <algorithm>
#include <numeric>

#include <ATen/ops/empty.h>

#include <lockstep/base/error.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/collectives/ordered_reduction.h>

#include "ordered_fold.h"

namespace lockstep {
namespace {

constexpr int64_t kPieceMultiple = 16;  // f32 elements: a cache line

// Where tensors are on a GPU: each addition in place of its left term.
void fold_on_device(const FoldPlan& plan, const std::vector<at::Tensor>& terms, const at::Tensor& out) {
  std::vector<at::Tensor> partials(plan.num_partials());
  const auto operand = [&](int which) { return which >= 0 ? terms[which] : partials[~which]; };
  for (const FoldPlan::Step& step : plan.steps()) partials[~step.sum] = operand(step.left).add_(operand(step.right));
  if (!out.is_same(terms[0])) out.copy_(terms[0]);
}

void fold_tensors(const FoldPlan& plan, const std::vector<at::Tensor>& terms, const at::Tensor& out) {
  if (!out.is_cpu()) return fold_on_device(plan, terms, out);
  std::vector<const std::byte*> data;
  data.reserve(terms.size());
  for (const at::Tensor& term : terms) data.push_back(static_cast<const std::byte*>(term.const_data_ptr()));
  fold(plan, at::kFloat, ReduceOp::kSum, data, static_cast<std::byte*>(out.mutable_data_ptr()), out.numel());
}

FoldPlan plan_of(std::span<const LeafBlock> blocks) {
  if (is_planted(Plant::kLeavesOutOfOrder)) return FoldPlan::of_leaves(static_cast<int64_t>(blocks.size()));
  return FoldPlan(blocks);
}

// Shares are contiguous and ascend with the rank, so the ranks' roots in rank order are all blocks from left to right.
std::vector<LeafBlock> all_blocks(int64_t num_leaves, int size) {
  std::vector<LeafBlock> blocks;
  for (int rank = 0; rank < size; ++rank) {
    for (const LeafBlock& block : maximal_aligned_blocks(leaf_share(num_leaves, rank, size))) blocks.push_back(block);
  }
  return blocks;
}

}  // namespace

LeafShare leaf_share(int64_t num_leaves, int rank, int size) {
  const int64_t each = num_leaves / size, more = num_leaves % size;
  const int64_t begin = rank * each + std::min<int64_t>(rank, more);
  return {begin, begin + each + (rank < more ? 1 : 0)};
}

std::vector<LeafBlock> maximal_aligned_blocks(LeafShare share) {
  std::vector<LeafBlock> blocks;
  for (int64_t leaf = share.begin; leaf < share.end; leaf = blocks.back().end()) blocks.push_back(root_of(leaf, share));
  return blocks;
}

LeafBlock root_of(int64_t leaf, LeafShare share) {
  LeafBlock block{leaf, 1};
  for (;;) {
    const LeafBlock parent{block.start - block.start % (2 * block.size), 2 * block.size};
    if (parent.start < share.begin || parent.end() > share.end) return block;
    block = parent;
  }
}

at::Tensor fold_roots(std::span<const LeafBlock> blocks, std::vector<at::Tensor> roots) {
  LOCKSTEP_CHECK(blocks.size() == roots.size() && !roots.empty())
      << roots.size() << " roots for " << blocks.size() << " blocks";
  if (roots.size() > 1) fold_tensors(FoldPlan(blocks), roots, roots[0]);
  return roots[0];
}

Piece owned_piece(int64_t numel, int rank, int size) {
  const int64_t lines = (numel + kPieceMultiple - 1) / kPieceMultiple;
  const int64_t each = (lines + size - 1) / size * kPieceMultiple;
  const int64_t begin = std::min(numel, rank * each);
  return {begin, std::min(numel, begin + each) - begin};
}

std::vector<Piece> even_pieces(int64_t numel, int size) {
  std::vector<Piece> pieces;
  pieces.reserve(size);
  for (int rank = 0; rank < size; ++rank) pieces.push_back(owned_piece(numel, rank, size));
  return pieces;
}

OrderedReduction::OrderedReduction(ProcessGroup& group, int64_t num_leaves, std::vector<at::Tensor> roots,
                                   std::vector<Piece> pieces, at::TensorOptions options, Milliseconds timeout)
    : group_(&group), num_leaves_(num_leaves), pieces_(std::move(pieces)), roots_(std::move(roots)) {
  LOCKSTEP_CHECK(num_leaves > 0) << "a sum of no leaves";
  const int size = group.size();
  const auto num_roots = static_cast<int64_t>(roots_.size());
  LOCKSTEP_CHECK(roots_.size() == maximal_aligned_blocks(leaf_share(num_leaves, group.rank(), size)).size())
      << roots_.size() << " roots do not fit the share of rank " << group.rank() << " of " << size << " in "
      << num_leaves << " leaves";
  LOCKSTEP_CHECK(pieces_.size() == static_cast<size_t>(size)) << pieces_.size() << " pieces for " << size << " ranks";
  shown_ = group.show(roots_, timeout);
  if (shown_) return;
  const int64_t own = pieces_[group.rank()].numel, numel = pieces_.back().offset + pieces_.back().numel;
  std::vector<int64_t> send_counts(size), receive_counts(size);
  for (int rank = 0; rank < size; ++rank) {
    send_counts[rank] = num_roots * pieces_[rank].numel;
    receive_counts[rank] =
        own * static_cast<int64_t>(maximal_aligned_blocks(leaf_share(num_leaves, rank, size)).size());
  }
  received_ = at::empty({std::accumulate(receive_counts.begin(), receive_counts.end(), int64_t{0})}, options);
  if (num_roots == 1) {
    send_ = roots_[0];  // its pieces already lie in rank order
  } else {
    send_ = at::empty({num_roots * numel}, options);
    int64_t offset = 0;
    for (const Piece& piece : pieces_) {
      for (const at::Tensor& root : roots_) {
        send_.narrow(0, offset, piece.numel).copy_(root.narrow(0, piece.offset, piece.numel));
        offset += piece.numel;
      }
    }
  }
  work_ = group.all_to_all(received_, send_, receive_counts, send_counts, timeout);
}

bool OrderedReduction::poll() { return shown_ ? shown_->poll() : work_.poll(); }

void OrderedReduction::finish(const at::Tensor& piece) {
  const Piece& own = pieces_[group_->rank()];
  LOCKSTEP_CHECK(piece.numel() == own.numel)
      << "piece has " << piece.numel() << " elements, this rank owns " << own.numel;
  shown_ ? fold_shown(own, piece) : fold_received(piece);
  roots_.clear();
  send_.reset();
  received_.reset();
}

void OrderedReduction::fold_received(const at::Tensor& piece) {
  work_.wait();
  const FoldPlan plan = plan_of(all_blocks(num_leaves_, group_->size()));
  const auto own = piece.numel(), num_roots = static_cast<int64_t>(plan.num_terms());
  std::vector<at::Tensor> terms;
  for (int64_t i = 0; i < num_roots; ++i) terms.push_back(received_.narrow(0, i * own, own));
  fold_tensors(plan, terms, piece);
}

// Out of the memory of whoever has the root.
void OrderedReduction::fold_shown(const Piece& own, const at::Tensor& piece) {
  shown_->wait();
  std::vector<const std::byte*> terms;
  for (int rank = 0; rank < group_->size(); ++rank) {
    const auto blocks = maximal_aligned_blocks(leaf_share(num_leaves_, rank, group_->size()));
    for (size_t root = 0; root < blocks.size(); ++root) {
      const auto* data = static_cast<const float*>(shown_->data(rank, root)) + own.offset;
      terms.push_back(reinterpret_cast<const std::byte*>(data));
    }
  }
  fold(plan_of(all_blocks(num_leaves_, group_->size())), at::kFloat, ReduceOp::kSum, terms,
       static_cast<std::byte*>(piece.mutable_data_ptr()), own.numel);
  shown_->done();
  shown_.reset();
}

at::Tensor ordered_all_reduce(ProcessGroup& group, int64_t num_leaves, std::vector<at::Tensor> leaves, int64_t numel,
                              at::TensorOptions options) {
  const LeafShare share = leaf_share(num_leaves, group.rank(), group.size());
  LOCKSTEP_CHECK(static_cast<int64_t>(leaves.size()) == share.count())
      << leaves.size() << " leaves for a share of " << share.count();
  std::vector<at::Tensor> roots;
  for (const LeafBlock& root : maximal_aligned_blocks(share)) {
    std::vector<LeafBlock> singles;
    std::vector<at::Tensor> inside;
    for (int64_t leaf = root.start; leaf < root.end(); ++leaf) {
      singles.push_back({leaf, 1});
      inside.push_back(group.empty_mapped(numel, options).copy_(leaves[leaf - share.begin]));
    }
    roots.push_back(fold_roots(singles, std::move(inside)));
  }
  at::Tensor sum = group.empty_mapped(numel, options);
  const Piece own = owned_piece(numel, group.rank(), group.size());
  at::Tensor piece = sum.narrow(0, own.offset, own.numel);
  OrderedReduction(group, num_leaves, std::move(roots), even_pieces(numel, group.size()), options).finish(piece);
  std::vector<int64_t> counts(group.size());
  for (int rank = 0; rank < group.size(); ++rank) counts[rank] = owned_piece(numel, rank, group.size()).numel;
  group.all_gather_uneven(sum, piece, counts).wait();
  return sum;
}

}  // namespace lockstep
