// The geometry of ordered reduction: shares, blocks, roots and pieces, by their defining properties.
#include <bit>
#include <set>

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/ordered_reduction.h>

namespace lockstep {
namespace {

constexpr int64_t kMostLeaves = 130;
constexpr int kMostRanks = 17;

std::string text(const LeafBlock& block) {
  return "[" + std::to_string(block.start) + ", " + std::to_string(block.end()) + ")";
}

bool is_aligned(const LeafBlock& block) {
  return std::has_single_bit(static_cast<uint64_t>(block.size)) && block.start % block.size == 0;
}

TEST(LeafShareTest, SharesTileTheLeavesInRankOrderAndDifferByAtMostOne) {
  for (int64_t n = 0; n <= kMostLeaves; ++n) {
    for (int size = 1; size <= kMostRanks; ++size) {
      int64_t next = 0;
      for (int rank = 0; rank < size; ++rank) {
        const LeafShare share = leaf_share(n, rank, size);
        ASSERT_EQ(share.begin, next) << n << " leaves, rank " << rank << " of " << size;
        ASSERT_EQ(share.count(), n / size + (rank < n % size ? 1 : 0));
        next = share.end;
      }
      ASSERT_EQ(next, n);
    }
  }
}

TEST(MaximalAlignedBlocksTest, TileAnyShareAndNoneCouldBeLarger) {
  for (int64_t begin = 0; begin <= 70; ++begin) {
    for (int64_t end = begin; end <= kMostLeaves; ++end) {
      const LeafShare share{begin, end};
      int64_t next = begin;
      for (const LeafBlock& block : maximal_aligned_blocks(share)) {
        ASSERT_EQ(block.start, next);
        ASSERT_TRUE(is_aligned(block)) << text(block);
        const LeafBlock parent{block.start / (2 * block.size) * 2 * block.size, 2 * block.size};
        ASSERT_FALSE(begin <= parent.start && parent.end() <= end)
            << text(block) << " of [" << begin << ", " << end << ") lies in " << text(parent);
        for (int64_t leaf = block.start; leaf < block.end(); ++leaf) ASSERT_EQ(root_of(leaf, share), block);
        next = block.end();
      }
      ASSERT_EQ(next, end);
    }
  }
}

TEST(MaximalAlignedBlocksTest, AreWhatTheHeaderSays) {
  EXPECT_EQ(maximal_aligned_blocks({3, 8}), (std::vector<LeafBlock>{{3, 1}, {4, 4}}));
  EXPECT_EQ(maximal_aligned_blocks({0, 12}), (std::vector<LeafBlock>{{0, 8}, {8, 4}}));
  EXPECT_EQ(maximal_aligned_blocks({1, 7}), (std::vector<LeafBlock>{{1, 1}, {2, 2}, {4, 2}, {6, 1}}));
  EXPECT_TRUE(maximal_aligned_blocks({5, 5}).empty());
}

TEST(OwnedPieceTest, PiecesTileTheBucketAndBeginOnCacheLines) {
  for (const int64_t numel : {0L, 1L, 15L, 16L, 17L, 100L, 255L, 256L, 1000L, 123'457L, (1L << 31) + 5}) {
    for (int size = 1; size <= kMostRanks; ++size) {
      int64_t next = 0;
      for (int rank = 0; rank < size; ++rank) {
        const Piece piece = owned_piece(numel, rank, size);
        ASSERT_GE(piece.numel, 0) << numel << " elements, rank " << rank << " of " << size;
        ASSERT_EQ(piece.offset, next);
        ASSERT_TRUE(piece.numel == 0 || piece.offset % 16 == 0) << piece.offset;
        ASSERT_LE(piece.numel, (numel + size - 1) / size + 16) << "nobody owns much more than a fair part";
        next += piece.numel;
      }
      ASSERT_EQ(next, numel);
    }
  }
}

TEST(FoldRootsTest, RefusesOtherThanOneRootABlock) {
  const std::vector<LeafBlock> blocks{{0, 2}, {2, 1}};
  EXPECT_THROW(fold_roots(blocks, {at::full({1}, 1, at::kFloat)}), CheckFailed);
  EXPECT_THROW(fold_roots({}, {}), CheckFailed);
}

}  // namespace
}  // namespace lockstep
