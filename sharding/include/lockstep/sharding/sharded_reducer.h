#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include <lockstep/flight/ring.h>
#include <lockstep/metrics/trace.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/gradient_sync.h>

namespace lockstep {

struct ShardedReducerOptions {
  int64_t num_leaves = 1;  ///< micro-batches of a global batch, over all ranks of the group
  int num_shards = 1;      ///< ranks a gradient is sharded over, neighbours; divides the group's size
  /// The parameters of each unit of the model, in forward order; together all, each once. A unit's gradients travel
  /// together, the last unit's first.
  std::vector<std::vector<size_t>> units;
  /// By unit: the part of the model it is in, each part a lane (of attach_lane, in this order) with rounds of its own:
  /// the chunks of a pipeline stage. Empty: one part. All ranks run the parts' micro-batches in the same order.
  std::vector<size_t> parts;
  /// Called on the lane's thread when the last gradient of a unit has been taken in this micro-batch: its parameters
  /// are not needed any more.
  std::function<void(size_t unit)> on_unit_done = [](size_t) {};
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
  metrics::TraceTrack track;  ///< each bucket's collectives, when they start and how long they are waited for
};

/// Gradients that leave after every micro-batch (ZeRO-2 and ZeRO-3): no rank keeps more of the sum than its piece.
///
/// Round k: leaf k * N + r runs on rank r; in the last round some ranks may have none. A unit's gradients meet in one
/// flat bucket, travel to their owners by an all-to-all, and the owner pushes them into a binary counter in the order
/// of the leaves: the canonical tree, for any number of ranks. One thread.
///
/// Memory: a piece, a unit's gradients while they are collected and while they travel (two at most), and log2(leaves)
/// pieces between rounds. Cost: (N-1)/N x bytes sent each round.
class ShardedReducer : public GradientSync {
 public:
  /// Collective: compares names and shapes over the ranks. @throws ConfigError two ranks have different parameters.
  ShardedReducer(ProcessGroup& group, std::vector<NamedParameter> parameters, ShardedReducerOptions options);
  ~ShardedReducer() override;
  ShardedReducer(const ShardedReducer&) = delete;
  ShardedReducer& operator=(const ShardedReducer&) = delete;

  std::vector<int64_t> leaves() const override;
  /// Micro-batches of the rank that has most. A rank that has fewer calls absent_leaf() for the rest.
  int64_t num_rounds() const;
  void begin_step() override;
  void end_leaf(int lane) override;
  void absent_leaf(size_t part = 0);
  /// Before absent_leaf(), where something else waits for other ranks between units: takes part in this unit's
  /// exchange.
  void absent_unit(size_t unit);
  void fold() override;
  at::Tensor piece_of(size_t i) const override;
  std::vector<at::Tensor> pieces(int partial_kind) const override;
  ExactSum publish() override;
  void wait() override;

 private:
  struct Bucket;
  struct Flight;
  struct Part {
    std::vector<size_t> buckets;  // in the order they leave
    int64_t round = 0;
    size_t next = 0;  // of buckets, to be launched in this round
  };

  void build_buckets();
  void allocate(std::vector<size_t> members, size_t unit);

  bool computes(int64_t leaf) const override {
    return leaf % group_.size() == group_.rank() && leaf < options_.num_leaves;
  }
  void begin_round(Part& part);
  size_t part_of(size_t unit) const { return options_.parts.empty() ? 0 : options_.parts[unit]; }
  void deliver(int64_t leaf, size_t parameter, at::Tensor grad) override;
  void launch_ready_buckets(Part& part);
  void launch(size_t bucket, int64_t round);
  void land();
  void push_round(Bucket& bucket, int64_t round, const at::Tensor& received);
  metrics::TraceSpan span(const char* name, size_t bucket) const;
  flight::LabelScope label_of(size_t bucket) const;  // for the hang watchdog
  int participants(int64_t round) const;
  int shard() const { return group_.rank() % options_.num_shards; }
  int num_replicas() const { return group_.size() / options_.num_shards; }

  ShardedReducerOptions options_;
  std::unique_ptr<ProcessGroup> split_replicas_;
  std::vector<std::unique_ptr<Bucket>> buckets_;   // a unit is one, or one for each kind of parameter
  std::vector<std::pair<size_t, size_t>> places_;  // by parameter: bucket, place in it
  std::vector<int64_t> unit_missing_;
  std::vector<Part> parts_;
  std::deque<Flight> flights_;
  bool first_step_ = true;
};

}  // namespace lockstep
