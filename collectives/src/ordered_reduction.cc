#include <algorithm>
#include <bit>
#include <numeric>

#include <ATen/ops/empty.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/ordered_reduction.h>

namespace lockstep {
namespace {

constexpr int64_t kPieceMultiple = 16;  // f32 elements: a cache line
constexpr int64_t kTile = 2048;         // floats folded at a time, so that partial sums stay in the first-level cache

struct Merge {
  size_t left, right;
};

// The additions of a binary counter that the blocks are pushed into from left to right, folded from small to large at
// the end: slot[left] += slot[right], in this order, leaves the sum in slot 0.
std::vector<Merge> merge_program(std::span<const LeafBlock> blocks) {
  struct Entry {
    LeafBlock block;
    size_t slot;
  };
  std::vector<Entry> counter;
  std::vector<Merge> program;
  const auto merge_last_two = [&] {
    const Entry right = counter.back();
    counter.pop_back();
    program.push_back({counter.back().slot, right.slot});
    counter.back().block.size += right.block.size;
  };
  for (size_t i = 0; i < blocks.size(); ++i) {
    counter.push_back({blocks[i], i});
    while (counter.size() > 1) {
      const LeafBlock &left = counter[counter.size() - 2].block, &right = counter.back().block;
      if (left.size != right.size || left.start % (2 * left.size) != 0) break;
      merge_last_two();
    }
  }
  while (counter.size() > 1) merge_last_two();
  return program;
}

// Runs the program over slots that lie in memory; the last sum goes to `out` (slot 0 itself is fine).
void fold(const std::vector<Merge>& program, const std::vector<float*>& slots, float* out, int64_t numel) {
  for (int64_t start = 0; start < numel; start += kTile) {
    const int64_t n = std::min(kTile, numel - start);
    if (program.empty()) {
      if (out != slots[0]) std::copy_n(slots[0] + start, n, out + start);
      continue;
    }
    for (size_t step = 0; step < program.size(); ++step) {
      const float *left = slots[program[step].left] + start, *right = slots[program[step].right] + start;
      float* sum = step + 1 == program.size() ? out + start : slots[program[step].left] + start;
      for (int64_t i = 0; i < n; ++i) sum[i] = left[i] + right[i];
    }
  }
}

void fold_tensors(const std::vector<Merge>& program, std::vector<at::Tensor>& slots, const at::Tensor& out) {
  if (out.is_cpu()) {
    std::vector<float*> data;
    data.reserve(slots.size());
    for (auto& slot : slots) data.push_back(slot.mutable_data_ptr<float>());
    fold(program, data, out.mutable_data_ptr<float>(), out.numel());
    return;
  }
  for (const Merge& merge : program) slots[merge.left].add_(slots[merge.right]);
  if (!out.is_same(slots[0])) out.copy_(slots[0]);
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
  if (roots.size() > 1) fold_tensors(merge_program(blocks), roots, roots[0]);
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

bool OrderedReduction::poll() { return work_.poll(); }

void OrderedReduction::finish(const at::Tensor& piece) {
  work_.wait();
  // Shares are contiguous and ascend with the rank, so what came in rank order is all blocks from left to right.
  std::vector<LeafBlock> blocks;
  for (int rank = 0; rank < group_->size(); ++rank) {
    for (const LeafBlock& block : maximal_aligned_blocks(leaf_share(num_leaves_, rank, group_->size())))
      blocks.push_back(block);
  }
  const int64_t own = pieces_[group_->rank()].numel;
  LOCKSTEP_CHECK(piece.numel() == own) << "piece has " << piece.numel() << " elements, this rank owns " << own;
  std::vector<at::Tensor> slots;
  for (size_t i = 0; i < blocks.size(); ++i) slots.push_back(received_.narrow(0, static_cast<int64_t>(i) * own, own));
  fold_tensors(merge_program(blocks), slots, piece);
  roots_.clear();
  send_.reset();
  received_.reset();
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
      inside.push_back(leaves[leaf - share.begin].clone());
    }
    roots.push_back(fold_roots(singles, std::move(inside)));
  }
  at::Tensor sum = at::empty({numel}, options);
  const Piece own = owned_piece(numel, group.rank(), group.size());
  at::Tensor piece = sum.narrow(0, own.offset, own.numel);
  OrderedReduction(group, num_leaves, std::move(roots), even_pieces(numel, group.size()), options).finish(piece);
  std::vector<int64_t> counts(group.size());
  for (int rank = 0; rank < group.size(); ++rank) counts[rank] = owned_piece(numel, rank, group.size()).numel;
  group.all_gather_uneven(sum, piece, counts).wait();
  return sum;
}

}  // namespace lockstep
