#include <algorithm>

#include <lockstep/base/error.h>
#include <lockstep/sharding/bucket_layout.h>

namespace lockstep {
namespace {

int64_t numel_of(const std::vector<int64_t>& shape) {
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  return numel;
}

// A scalar is one row; rows of a tensor without elements have none either.
struct Rows {
  explicit Rows(const std::vector<int64_t>& shape)
      : count(shape.empty() ? 1 : shape[0]), numel(count > 0 ? numel_of(shape) / count : 0) {}
  int64_t count, numel;
};

}  // namespace

int64_t cache_aligned(int64_t numel) {
  constexpr int64_t kFloatsInALine = 16;
  return (numel + kFloatsInALine - 1) / kFloatsInALine * kFloatsInALine;
}

RowRange row_range(int64_t rows, int rank, int size) {
  const int64_t each = rows / size, more = rows % size;
  return {rank * each + std::min<int64_t>(rank, more), each + (rank < more ? 1 : 0)};
}

at::Tensor shard_of(const at::Tensor& whole, int rank, int size) {
  if (whole.dim() == 0) return rank == 0 ? whole : whole.view({1}).narrow(0, 0, 0);
  const RowRange rows = row_range(whole.size(0), rank, size);
  return whole.narrow(0, rows.begin, rows.count);
}

std::vector<int64_t> shard_shape(const std::vector<int64_t>& shape, int rank, int size) {
  if (shape.empty()) return rank == 0 ? shape : std::vector<int64_t>{0};
  std::vector<int64_t> rows = shape;
  rows[0] = row_range(shape[0], rank, size).count;
  return rows;
}

BucketLayout::BucketLayout(const std::vector<std::vector<int64_t>>& shapes, int num_shards, int num_replicas)
    : shapes_(shapes),
      num_shards_(num_shards),
      num_replicas_(num_replicas),
      pieces_(static_cast<size_t>(num_shards) * num_replicas),
      segments_(shapes.size()),
      shard_numels_(num_shards),
      offsets_(shapes.size(), std::vector<int64_t>(num_shards)) {
  LOCKSTEP_CHECK(num_shards > 0 && num_replicas > 0) << num_shards << " shards of " << num_replicas << " replicas";
  for (int shard = 0; shard < num_shards; ++shard) {
    for (size_t i = 0; i < shapes.size(); ++i) {
      offsets_[i][shard] = shard_numels_[shard];
      const Rows rows(shapes[i]);
      shard_numels_[shard] += cache_aligned(row_range(rows.count, shard, num_shards).count * rows.numel);
    }
  }
  for (int replica = 0; replica < num_replicas; ++replica) {
    for (int shard = 0; shard < num_shards; ++shard) {
      Piece& piece = pieces_[replica * num_shards + shard];
      piece = {numel_, pieces_of_shard(shard)[replica].numel};
      numel_ += piece.numel;
    }
  }
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Rows rows(shapes[i]);
    for (int shard = 0; shard < num_shards; ++shard) {
      const RowRange range = row_range(rows.count, shard, num_shards);
      place(i, shard, range.begin * rows.numel, range.count * rows.numel);
    }
  }
  find_padding();
}

// A parameter's rows of one shard, cut where the shard's pieces are cut.
void BucketLayout::place(size_t parameter, int shard, int64_t in_parameter, int64_t numel) {
  const int64_t begin = offsets_[parameter][shard], end = begin + numel;
  const auto cuts = pieces_of_shard(shard);
  for (int replica = 0; replica < num_replicas_; ++replica) {
    const int64_t from = std::max(begin, cuts[replica].offset),
                  to = std::min(end, cuts[replica].offset + cuts[replica].numel);
    if (from >= to) continue;
    const int64_t in_bucket = pieces_[replica * num_shards_ + shard].offset + from - cuts[replica].offset;
    segments_[parameter].push_back({in_parameter + from - begin, in_bucket, to - from});
  }
}

void BucketLayout::find_padding() {
  std::vector<Piece> used;
  for (const auto& segments : segments_) {
    for (const Segment& segment : segments) used.push_back({segment.in_bucket, segment.numel});
  }
  std::sort(used.begin(), used.end(), [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
  used.push_back({numel_, 0});
  int64_t end = 0;
  for (const Piece& piece : used) {
    if (piece.offset > end) padding_.push_back({end, piece.offset - end});
    end = piece.offset + piece.numel;
  }
}

at::Tensor BucketLayout::view(const at::Tensor& flat_shard, size_t parameter, int shard) const {
  const auto shape = shard_shape(shapes_[parameter], shard, num_shards_);
  return flat_shard.narrow(0, offsets_[parameter][shard], numel_of(shape)).view(shape);
}

}  // namespace lockstep
