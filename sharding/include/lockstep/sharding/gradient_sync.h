#pragma once

#include <atomic>
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

/// A parameter whose gradient is reduced. Tied weights are one entry for each use, each with its own autograd leaf over
/// the same storage: their gradients have a tree each and are added after it, first use + second use, so that a
/// pipeline that parts the uses changes no bit.
struct NamedParameter {
  std::string name;
  at::Tensor tensor;          ///< f32, contiguous, requires grad
  int64_t first_use = -1;     ///< index of the entry whose storage this one shares; its gradient gets this one's too
  bool is_tied_away = false;  ///< the other use is on another pipeline stage: the caller joins the two, see piece_of()
  bool is_counted = true;     ///< in the squares: of copies on several ranks beyond this group, one counts
  /// Not 0: a term of a sum over ranks beyond this group, which the caller takes, see pieces(). Parameters of one kind
  /// are summed alike.
  int partial_kind = 0;
};

/// Turns the gradients of micro-batches into this rank's part of their sum over the global batch.
///
/// Lane: one thread that runs micro-batches of this rank with its own module instance, whose parameters alias lane 0's
/// storage; or one part of the model that does so on its own. Leaf: one micro-batch of the global batch
/// (collectives/ordered_reduction.h). The gradient is taken from the parameter as soon as autograd has finished it, so
/// the next leaf finds it undefined.
///
/// A step: begin_step(); for each of leaves(), on some lane: begin_leaf(), backward, end_leaf(); fold(); publish();
/// wait(); then read grad(i) until the next begin_step(). Gradients are sums: the loss carries the divisor.
/// Threads: begin_leaf/end_leaf and the hooks from each lane's own thread; everything else from one.
class GradientSync {
 public:
  virtual ~GradientSync() = default;
  GradientSync(const GradientSync&) = delete;
  GradientSync& operator=(const GradientSync&) = delete;

  /// Hooks a lane's parameters, in the order given at construction; undefined where the lane runs but a part of the
  /// model and the parameter is not in it (a chunk of a pipeline stage). @return the lane's number.
  int attach_lane(const std::vector<at::Tensor>& parameters);

  /// The micro-batches of the global batch that this rank computes, ascending.
  virtual std::vector<int64_t> leaves() const = 0;

  virtual void begin_step() = 0;
  void begin_leaf(int lane, int64_t leaf);
  virtual void end_leaf(int lane);

  /// Waits until this rank's pieces of the sum are complete.
  /// @throws CheckFailed when a leaf is missing. @throws ConfigError in the first step, naming parameters no rank has a
  /// gradient for.
  virtual void fold() = 0;
  /// Between fold() and publish(): this rank's piece of a parameter that is_tied_away, to be added to the other use's.
  virtual at::Tensor piece_of(size_t i) const = 0;
  /// Between fold() and publish(): this rank's pieces, of all parameters or of one partial_kind. Ranks beyond this
  /// group whose parameters have the same shapes and flags have pieces of the same sizes in the same order.
  static constexpr int kAll = -1;
  virtual std::vector<at::Tensor> pieces(int partial_kind) const = 0;
  /// Starts gathering the pieces where ranks want more than their own. @return the sum of squares of this rank's
  /// pieces: merged over ranks, each element of the gradient counts once.
  virtual ExactSum publish() = 0;
  /// Waits until grad() holds every element.
  virtual void wait() = 0;
  ExactSum reduce() {
    fold();
    return publish();
  }

  /// The reduced gradient of parameter i: a view with the parameter's shape, or that of this rank's rows (shard_of())
  /// where gradients are sharded. The same tensor in every step. Undefined for a second use.
  const at::Tensor& grad(size_t i) const { return grads_[i]; }
  size_t num_parameters() const { return parameters_.size(); }

 protected:
  GradientSync(ProcessGroup& group, std::vector<NamedParameter> parameters);

  virtual bool computes(int64_t leaf) const = 0;  ///< whether the leaf is one of leaves()
  /// From the hook, on the lane's thread; an undefined gradient means "no contribution".
  virtual void deliver(int64_t leaf, size_t parameter, at::Tensor grad) = 0;
  /// Whether the parameter has a bucket of its own, so that its other use's bucket is cut alike.
  bool stands_alone(size_t parameter) const { return stands_alone_[parameter]; }
  /// Whether two parameters may share a bucket: whatever happens to a piece happens to both.
  bool may_share_bucket(size_t a, size_t b) const;
  std::vector<std::vector<int64_t>> shapes_of(const std::vector<size_t>& members) const;
  void check_all_used();

  ProcessGroup& group_;
  std::vector<NamedParameter> parameters_;
  std::vector<at::Tensor> grads_;

 private:
  friend class GradientHook;
  struct Lane {
    int64_t leaf = -1;
    std::vector<bool> has, arrived;  // by parameter
  };

  void check_parameters_agree();
  void take(int lane, size_t parameter, at::Tensor grad);

  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<bool> stands_alone_;
  std::unique_ptr<std::atomic<bool>[]> used_;
};

}  // namespace lockstep
