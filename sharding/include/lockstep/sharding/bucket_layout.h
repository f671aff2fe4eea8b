#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/ordered_reduction.h>

namespace lockstep {

/// Rank `rank`'s rows of `rows`: sizes differ by at most one, the first rows % size ranks have one more.
struct RowRange {
  int64_t begin = 0;
  int64_t count = 0;
};
RowRange row_range(int64_t rows, int rank, int size);

/// Shard `rank` of a tensor cut over `size` ranks along dim 0: a contiguous view. A scalar is whole on rank 0.
at::Tensor shard_of(const at::Tensor& whole, int rank, int size);
std::vector<int64_t> shard_shape(const std::vector<int64_t>& shape, int rank, int size);

/// The f32 elements that a tensor of `numel` takes in flat memory so that no two share a cache line.
int64_t cache_aligned(int64_t numel);

/// How a bucket's parameters lie in flat memory, and which piece of it belongs to which rank.
///
/// The data-parallel ranks form `num_replicas` replicas of `num_shards` ranks each, neighbours sharing a replica: rank
/// r holds shard r % num_shards. Shard: each parameter's rows of row_range(), one parameter after the other, each on a
/// cache line of its own. Piece: a shard cut evenly over its replicas, so that every rank reduces the same amount;
/// pieces follow each other in rank order. One shard: every rank gets the whole gradient (stage 0). As many shards as
/// ranks: a piece is a shard, and nothing is gathered (ZeRO).
class BucketLayout {
 public:
  struct Segment {
    int64_t in_parameter = 0, in_bucket = 0, numel = 0;  ///< elements
  };

  BucketLayout(const std::vector<std::vector<int64_t>>& shapes, int num_shards, int num_replicas);

  int64_t numel() const { return numel_; }
  const std::vector<Piece>& pieces() const { return pieces_; }  ///< by rank
  /// Where the elements of a parameter lie in the bucket.
  const std::vector<Segment>& segments(size_t parameter) const { return segments_[parameter]; }
  /// What lies between segments, to be zeroed once.
  const std::vector<Piece>& padding() const { return padding_; }

  int64_t shard_numel(int shard) const { return shard_numels_[shard]; }
  /// Where a parameter's rows begin in the flat memory of a shard.
  int64_t offset_in_shard(size_t parameter, int shard) const { return offsets_[parameter][shard]; }
  /// A shard's pieces, by replica.
  std::vector<Piece> pieces_of_shard(int shard) const { return even_pieces(shard_numels_[shard], num_replicas_); }

  /// Parameter's view into a shard's flat memory, with the shape of its rows.
  at::Tensor view(const at::Tensor& flat_shard, size_t parameter, int shard) const;

 private:
  void place(size_t parameter, int shard, int64_t in_parameter, int64_t numel);
  void find_padding();

  std::vector<std::vector<int64_t>> shapes_;
  int num_shards_, num_replicas_;
  int64_t numel_ = 0;
  std::vector<Piece> pieces_, padding_;
  std::vector<std::vector<Segment>> segments_;
  std::vector<int64_t> shard_numels_;
  std::vector<std::vector<int64_t>> offsets_;
};

}  // namespace lockstep
