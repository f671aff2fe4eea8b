#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/base/exact_sum.h>
#include <lockstep/collectives/ordered_reduction.h>
#include <lockstep/collectives/process_group.h>

namespace lockstep {

enum class Reduction {
  kOrdered,  ///< the canonical tree over micro-batches: same bits on any number of ranks
  kFast,     ///< the back end's own order
};

struct NamedParameter {
  std::string name;
  at::Tensor tensor;  ///< f32, contiguous, requires grad
};

struct GradientReducerOptions {
  int64_t num_leaves = 1;                 ///< micro-batches of a global batch, over all ranks of the group
  int64_t bucket_bytes = 25 * (1 << 20);  ///< PyTorch DDP's default (kDefaultBucketBytesCap)
  int64_t first_bucket_bytes = 1 << 20;   ///< a small first bucket leaves early (kDefaultFirstBucketBytes)
  Reduction reduction = Reduction::kOrdered;
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
};

/// Data-parallel gradients: gathers each micro-batch's gradients from autograd hooks, sums them over micro-batches and
/// ranks, and hands them out as views into flat buckets.
///
/// Lane: one thread that runs micro-batches of this rank with its own module instance, whose parameters alias lane 0's
/// storage. Leaf: one micro-batch of the global batch (collectives/ordered_reduction.h). A gradient that arrives is
/// merged with its sibling in the tree if that is there, else it waits; addition commutes, so the order of arrival does
/// not matter, and neither do lanes. Bucket: neighbouring parameters in reverse registration order (about the order of
/// backward), sent together as soon as every parameter's roots are complete; bucket k leaves only after bucket k - 1,
/// on every rank.
///
/// A step: begin_step(); each lane: begin_leaf(), backward, end_leaf(), for all leaves of share(); reduce(); then read
/// grad(i) until the next begin_step(). Gradients are sums: the loss carries the divisor. Threads: begin_leaf/end_leaf
/// and the hooks from each lane's own thread; everything else from one. Cost: one add a gradient element a leaf,
/// (N-1)/N x bytes sent twice a step.
class GradientReducer {
 public:
  /// Collective: compares names and shapes over the ranks. @throws ConfigError two ranks have different parameters.
  GradientReducer(ProcessGroup& group, std::vector<NamedParameter> parameters, GradientReducerOptions options);
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  /// Hooks a lane's parameters, in the order given at construction. @return the lane's number.
  int attach_lane(const std::vector<at::Tensor>& parameters);

  LeafShare share() const { return share_; }

  void begin_step();
  void begin_leaf(int lane, int64_t leaf);
  void end_leaf(int lane);

  /// Waits for the buckets, folds this rank's pieces and starts gathering them. @return the sum of squares of this
  /// rank's pieces, to be merged over ranks: each element of the gradient is counted once.
  /// @throws CheckFailed when a leaf is missing. @throws ConfigError in the first step, naming parameters no rank has a
  /// gradient for.
  ExactSum reduce();
  /// Waits until grad() holds every element (reduce() leaves the gathers under way).
  void wait();

  /// The reduced gradient of parameter i: a view into its bucket, with the parameter's shape. The same tensor in every
  /// step.
  const at::Tensor& grad(size_t i) const { return grads_[i]; }
  size_t num_parameters() const { return parameters_.size(); }
  size_t num_buckets() const { return buckets_.size(); }

 private:
  friend class GradientHook;
  struct Bucket;
  struct Slot;
  struct Lane;

  void build_buckets();
  void check_parameters_agree();
  void check_all_used();
  void deliver(int lane, size_t parameter, at::Tensor grad);  // from the hook; an undefined grad is "no contribution"
  void complete_root(size_t parameter, size_t root, const at::Tensor& left, const at::Tensor& right);
  void launch_ready_buckets(size_t bucket);
  void reduce_bucket(Bucket& bucket);
  void gather_pieces();

  ProcessGroup& group_;
  std::vector<NamedParameter> parameters_;
  GradientReducerOptions options_;
  LeafShare share_;
  std::vector<LeafBlock> root_blocks_;
  std::vector<std::unique_ptr<Bucket>> buckets_;
  std::vector<std::unique_ptr<Slot>> slots_;  // by parameter
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<at::Tensor> grads_;
  struct LaunchState;
  std::unique_ptr<LaunchState> launch_;
  bool first_step_ = true;
};

}  // namespace lockstep
