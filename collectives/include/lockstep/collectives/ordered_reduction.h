#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// Ordered reduction: the same bits for any number of ranks.
///
/// Leaf: the gradient of one micro-batch; leaves 0 .. n-1 make a global batch. Their sum is one fixed binary tree over
/// the leaf index, split at the largest power of two below n: the order in which a binary counter adds, whoever holds
/// the leaves. Block: 2^j leaves starting at a multiple of 2^j; a subtree. Root: the sum of a block. Share: the
/// contiguous leaves of one rank; it sums its maximal aligned blocks and sends the roots (facts: "local tree, then tree
/// over ranks" is wrong unless shares are powers of two).
struct LeafBlock {
  int64_t start = 0;
  int64_t size = 1;  ///< a power of two; start is a multiple of it
  int64_t end() const { return start + size; }
  friend bool operator==(const LeafBlock&, const LeafBlock&) = default;
};

struct LeafShare {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t count() const { return end - begin; }
};

/// Rank r's contiguous share of `num_leaves`: the first num_leaves % size ranks get one more.
LeafShare leaf_share(int64_t num_leaves, int rank, int size);

/// The blocks a share falls into, left to right. E.g. [3, 8) -> {3,1} {4,4}.
std::vector<LeafBlock> maximal_aligned_blocks(LeafShare share);

/// The largest block holding `leaf` whose leaves all lie in `share`: the root that leaf ends up in.
LeafBlock root_of(int64_t leaf, LeafShare share);

/// Sums the roots of all blocks of 0 .. num_leaves (left to right) into the canonical tree's value, in place of the
/// first.
/// @param roots equal shapes, f32; consumed. @return roots[0], now the sum.
at::Tensor fold_roots(std::span<const LeafBlock> blocks, std::vector<at::Tensor> roots);

/// What one rank owns of a bucket: elements [offset, offset + numel).
struct Piece {
  int64_t offset = 0;
  int64_t numel = 0;
};
/// Rank r's piece of a bucket of `numel` elements: multiples of 16 elements (one cache line), so pieces never share a
/// line. The last ones may be short or empty.
Piece owned_piece(int64_t numel, int rank, int size);
/// The pieces of all ranks.
std::vector<Piece> even_pieces(int64_t numel, int size);

/// One bucket's ordered reduce-scatter under way: all roots of all ranks travel to the owner of each piece, who folds
/// them; where ranks can show each other their memory, the owner folds out of that, and nothing travels.
///
/// Collective over `group`. Bucket: f32 elements, cut into size() pieces that follow each other without a gap; piece r
/// belongs to rank r and may be empty.
class OrderedReduction {
 public:
  /// Sends `roots` (one tensor of the bucket's size for each of this rank's maximal blocks, left to right) and receives
  /// into scratch.
  /// @param roots none on a rank without leaves, so the options are told. Untouched until finish() returns.
  /// In mapped memory (ProcessGroup::empty_mapped) they are not copied.
  /// @param pieces by rank, equal on all ranks.
  OrderedReduction(ProcessGroup& group, int64_t num_leaves, std::vector<at::Tensor> roots, std::vector<Piece> pieces,
                   at::TensorOptions options, Milliseconds timeout = ProcessGroup::kDefaultTimeout);
  /// Waits, folds, and writes this rank's piece of the sum to `piece`, which may be this rank's part of a root.
  void finish(const at::Tensor& piece);
  bool poll();

 private:
  void fold_received(const at::Tensor& piece);
  void fold_shown(const Piece& own, const at::Tensor& piece);

  ProcessGroup* group_;
  int64_t num_leaves_;
  std::vector<Piece> pieces_;
  std::vector<at::Tensor> roots_;
  at::Tensor send_, received_;
  Work work_;
  std::unique_ptr<Shown> shown_;
};

/// The whole ordered all-reduce, blocking: `leaves` are this rank's share, in order, [numel] each; returns the sum on
/// every rank.
at::Tensor ordered_all_reduce(ProcessGroup& group, int64_t num_leaves, std::vector<at::Tensor> leaves, int64_t numel,
                              at::TensorOptions options);

}  // namespace lockstep
