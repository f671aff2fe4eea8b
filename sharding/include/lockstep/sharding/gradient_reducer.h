#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <lockstep/flight/ring.h>
#include <lockstep/metrics/trace.h>
#include <lockstep/sharding/gradient_sync.h>

namespace lockstep {

struct GradientReducerOptions {
  int64_t num_leaves = 1;                    ///< micro-batches of a global batch, over all ranks of the group
  int num_shards = 1;                        ///< ranks a gradient is sharded over, neighbours; divides the group's size
  int64_t bucket_bytes = int64_t{25} << 20;  ///< PyTorch DDP's default (kDefaultBucketBytesCap)
  int64_t first_bucket_bytes = 1 << 20;      ///< a small first bucket leaves early (kDefaultFirstBucketBytes)
  Reduction reduction = Reduction::kOrdered;
  bool has_terms_beyond_group = false;  ///< the caller adds to pieces() before publish()
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
  metrics::TraceTrack track;  ///< each bucket's collectives, when they start and how long they are waited for
};

/// Gradients that accumulate on their rank before they travel (data parallelism, ZeRO-1): a rank's leaves are
/// neighbours, their maximal aligned blocks are summed here, and the roots of all ranks meet once a step.
///
/// A gradient that arrives is merged with its sibling in the tree if that is there, else it waits; addition commutes,
/// so the order of arrival does not matter, and neither do lanes. Bucket: neighbouring parameters in reverse
/// registration order (about the order of backward), sent together as soon as every parameter's roots are complete;
/// bucket k leaves only after bucket k - 1, on every rank. How it is cut: bucket_layout.h.
///
/// Memory: a gradient set, and a set more for each further root and each level of the tree between micro-batches. A
/// tied weight is one of it where each rank sends one root: the second use's leaves before the first one's is complete.
/// Cost: one add a gradient element a leaf, (N-1)/N x bytes sent once, or twice where whole gradients are gathered.
class GradientReducer : public GradientSync {
 public:
  /// Collective: compares names and shapes over the ranks. @throws ConfigError two ranks have different parameters.
  GradientReducer(ProcessGroup& group, std::vector<NamedParameter> parameters, GradientReducerOptions options);
  ~GradientReducer() override;
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  LeafShare share() const { return share_; }
  std::vector<int64_t> leaves() const override;
  void begin_step() override;
  void fold() override;
  at::Tensor piece_of(size_t i) const override;
  std::vector<at::Tensor> pieces(int partial_kind) const override;
  ExactSum publish() override;
  void wait() override;
  size_t num_buckets() const { return buckets_.size(); }

 private:
  struct Bucket;
  struct Slot;

  void build_buckets();
  std::optional<size_t> lender_to(size_t first_use) const;
  void allocate(Bucket& bucket);
  bool computes(int64_t leaf) const override { return leaf >= share_.begin && leaf < share_.end; }
  void deliver(int64_t leaf, size_t parameter, at::Tensor grad) override;
  void complete_root(size_t parameter, size_t root, const at::Tensor& left, const at::Tensor& right);
  void launch_ready_buckets(size_t bucket);
  void take_over_root(Bucket& bucket);
  void finish_before(const Bucket& bucket);
  void reduce_bucket(Bucket& bucket);
  void finish_ordered(Bucket& bucket);
  bool wants_gather(const Bucket& bucket) const;
  void gather(Bucket& bucket);
  metrics::TraceSpan span(const char* name, const Bucket& bucket) const;
  flight::LabelScope label_of(const Bucket& bucket) const;  // for the hang watchdog
  int shard() const { return group_.rank() % options_.num_shards; }
  int num_replicas() const { return group_.size() / options_.num_shards; }

  GradientReducerOptions options_;
  LeafShare share_;
  std::vector<LeafBlock> root_blocks_;
  std::unique_ptr<ProcessGroup> split_replicas_;  // where a replica is some of the ranks
  std::vector<std::unique_ptr<Bucket>> buckets_;
  std::vector<std::unique_ptr<Slot>> slots_;  // by parameter
  struct LaunchState;
  std::unique_ptr<LaunchState> launch_;
  bool first_step_ = true;
};

}  // namespace lockstep
