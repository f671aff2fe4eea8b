#include <numeric>

#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/sharding/bucket_layout.h>

namespace lockstep {
namespace {

const std::vector<std::vector<int64_t>> kBucketShapes = {{3}, {17, 5}, {}, {0}, {31, 33}, {2, 3, 5}, {0, 4}};

int64_t numel_of(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

TEST(BucketLayoutTest, EveryElementHasOnePlaceAndEveryPieceOneOwner) {
  for (const int shards : {1, 2, 3, 5, 8}) {
    for (const int replicas : {1, 2, 3}) {
      const BucketLayout layout(kBucketShapes, shards, replicas);
      std::vector<int> taken(layout.numel(), 0);
      for (const auto& [offset, numel] : layout.padding()) {
        for (int64_t i = 0; i < numel; ++i) ++taken[offset + i];
      }
      for (size_t p = 0; p < kBucketShapes.size(); ++p) {
        int64_t elements = 0;
        for (const auto& segment : layout.segments(p)) {
          for (int64_t i = 0; i < segment.numel; ++i) ++taken[segment.in_bucket + i];
          elements += segment.numel;
        }
        EXPECT_EQ(elements, numel_of(kBucketShapes[p]));
      }
      for (const int count : taken) ASSERT_EQ(count, 1);
      int64_t end = 0;
      for (const Piece& piece : layout.pieces()) {
        EXPECT_EQ(piece.offset, end);
        end += piece.numel;
      }
      EXPECT_EQ(end, layout.numel());
      EXPECT_EQ(layout.pieces().size(), static_cast<size_t>(shards) * replicas);
    }
  }
}

TEST(BucketLayoutTest, AShardsPiecesMakeUpItsRows) {
  for (const int shards : {1, 3, 4}) {
    for (const int replicas : {1, 2, 5}) {
      const BucketLayout layout(kBucketShapes, shards, replicas);
      std::vector<at::Tensor> wholes;
      at::Tensor bucket = torch::zeros({layout.numel()});
      for (size_t p = 0; p < kBucketShapes.size(); ++p) {
        wholes.push_back(torch::randn(kBucketShapes[p]));
        for (const auto& [from, to, numel] : layout.segments(p))
          bucket.narrow(0, to, numel).copy_(wholes[p].view({-1}).narrow(0, from, numel));
      }
      for (int shard = 0; shard < shards; ++shard) {
        std::vector<at::Tensor> pieces;
        for (int replica = 0; replica < replicas; ++replica) {
          const Piece piece = layout.pieces()[replica * shards + shard];
          pieces.push_back(bucket.narrow(0, piece.offset, piece.numel));
        }
        const at::Tensor flat = at::cat(pieces);
        for (size_t p = 0; p < kBucketShapes.size(); ++p)
          EXPECT_TRUE(at::equal(layout.view(flat, p, shard), shard_of(wholes[p], shard, shards))) << p;
      }
    }
  }
}

TEST(BucketLayoutTest, ShardsBeginOnCacheLinesAndDifferByARow) {
  const BucketLayout layout({{7, 3}, {5}}, 4, 1);
  std::vector<int64_t> rows;
  for (int shard = 0; shard < 4; ++shard) {
    EXPECT_EQ(layout.offset_in_shard(1, shard) % 16, 0);
    EXPECT_EQ(layout.pieces()[shard].offset % 16, 0);
    rows.push_back(shard_shape({7, 3}, shard, 4)[0]);
  }
  EXPECT_EQ(rows, (std::vector<int64_t>{2, 2, 2, 1}));
}

}  // namespace
}  // namespace lockstep
