#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace lockstep {

namespace flight {
class Ring;
}

enum class ReduceOp { kSum, kMax, kMin };

using Milliseconds = std::chrono::milliseconds;

/// A collective under way. Keeps its tensors alive. Destroying one that was not waited for abandons it: the group is
/// unusable then.
class Work {
 public:
  /// What a back end implements: one operation in flight.
  class Operation {
   public:
    virtual ~Operation() = default;
    virtual void wait() = 0;  ///< blocks until done or the deadline given at the call; throws CollectiveError
    virtual bool poll() = 0;  ///< moves the operation on without blocking; true when done
  };

  Work() = default;  ///< already done
  explicit Work(std::unique_ptr<Operation> operation) : operation_(std::move(operation)) {}

  /// Host waits until the result may be read (on a GPU: the current stream waits, the host does not). Twice is
  /// harmless.
  void wait();
  /// True when wait() would not block. Also pokes the back end, so calling it between pieces of compute moves data.
  bool poll();

  /// From here on `ring` hears when this is waited for and when it is done (the call with that ticket).
  void watch(flight::Ring& ring, uint64_t ticket);

 private:
  std::unique_ptr<Operation> operation_;
  flight::Ring* ring_ = nullptr;
  uint64_t ticket_ = 0;
};

/// Tensors that the ranks of a group show each other where they lie (ProcessGroup::show).
class Shown {
 public:
  virtual ~Shown() = default;
  virtual bool poll() = 0;  ///< true when wait() would not block
  virtual void wait() = 0;  ///< until all ranks have shown theirs, or the deadline; throws CollectiveError
  /// The `index`-th tensor of `rank`; to be read between wait() and done().
  virtual const void* data(int rank, size_t index) const = 0;
  /// This rank has read what it wanted; waits until all have, so that its own tensors may change again.
  virtual void done() = 0;
};

/// The ranks that reduce together, and the channel between them.
///
/// Collective: all ranks make the same calls in the same order; one that stays away makes the others time out.
/// Threads: one at a time. Streams: work queued later on the caller's current stream sees the result.
/// Tensors: contiguous, numel() may be 0 and may pass 2^31; dtypes f32, f64, bf16, f16, i32, i64, u8; equal on all
/// ranks. Timeouts are for the whole operation, not for each hop; expiry and a lost peer throw CollectiveError from
/// wait().
class ProcessGroup {
 public:
  static constexpr Milliseconds kDefaultTimeout{300'000};

  virtual ~ProcessGroup() = default;  // never waits for another rank; close() is the orderly way
  ProcessGroup() = default;
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual const std::string& name() const = 0;  ///< e.g. "world", "data"; in every error message
  virtual const char* backend() const = 0;      ///< "local", "shm", "two_level", "mpi", "nccl"

  /// How long control data is waited for (all_gather_bytes, all_gather_text). Groups split from this one begin with it.
  Milliseconds control_timeout() const { return control_timeout_; }
  void set_control_timeout(Milliseconds timeout) { control_timeout_ = timeout; }

  /// Replaces `tensor` by the elementwise sum (max, min) over all ranks, in the back end's own order (`fast`).
  /// For bits that do not depend on the layout use ordered_reduction.h.
  /// Cost: 2(p-1)/p x bytes sent a rank (ring). Source: Patarasuk & Yuan, JPDC 69(2), 2009,
  /// doi:10.1016/j.jpdc.2008.09.002.
  virtual Work all_reduce(at::Tensor tensor, ReduceOp op = ReduceOp::kSum, Milliseconds timeout = kDefaultTimeout) = 0;
  /// `input` [p * n] -> `output` [n]: rank r gets the reduction of everybody's r-th piece.
  virtual Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op = ReduceOp::kSum,
                              Milliseconds timeout = kDefaultTimeout) = 0;
  /// `input` [n] -> `output` [p * n], in rank order. `input` may be this rank's own piece of `output` (in place).
  virtual Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout = kDefaultTimeout) = 0;
  /// Uneven: rank r brings `counts[r]` elements; `output` holds their concatenation. In place as above.
  virtual Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                                 Milliseconds timeout = kDefaultTimeout) = 0;
  /// `send_counts[q]` elements of `input` go to rank q; `output` holds what came, `receive_counts[q]` from rank q, in
  /// rank order.
  virtual Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                          std::span<const int64_t> send_counts, Milliseconds timeout = kDefaultTimeout) = 0;
  virtual Work broadcast(at::Tensor tensor, int root, Milliseconds timeout = kDefaultTimeout) = 0;
  virtual Work send(at::Tensor tensor, int to, int tag = 0, Milliseconds timeout = kDefaultTimeout) = 0;
  virtual Work recv(at::Tensor tensor, int from, int tag = 0, Milliseconds timeout = kDefaultTimeout) = 0;
  virtual void barrier(Milliseconds timeout = kDefaultTimeout) = 0;

  /// A tensor [numel] in memory that the peers of this group reach too, where the back end has such (shm): collectives
  /// on it, or on a part of it, copy less. Anywhere else plain memory. Not collective; valid after close().
  virtual at::Tensor empty_mapped(int64_t numel, at::TensorOptions options);

  /// Lets every rank read all `tensors` of all ranks; null on every rank where the back end cannot. Each rank may bring
  /// any number of any size; those from empty_mapped() are not even copied. They stay as they are until done().
  virtual std::unique_ptr<Shown> show(const std::vector<at::Tensor>& tensors, Milliseconds timeout = kDefaultTimeout);

  /// Where this rank notes its calls for the hang watchdog, with step and phase; null where nobody watches.
  virtual flight::Ring* flight_ring() const { return nullptr; }

  /// Ranks with equal `color` form a group, ordered by `key`, then rank. Collective over this group.
  std::unique_ptr<ProcessGroup> split(int color, int key, const std::string& name);

  /// Orderly end, collective. After abort() or an error it only frees local resources.
  virtual void close() = 0;
  /// Gives up at once, without the peers; what is in flight fails. Any thread.
  virtual void abort() noexcept = 0;

 private:
  virtual std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) = 0;  // split()

  Milliseconds control_timeout_ = kDefaultTimeout;
};

/// Gathers each rank's `value` (trivially copyable) in rank order. A small, blocking convenience for control data,
/// which waits for the group's control_timeout().
std::string all_gather_bytes(ProcessGroup& group, std::span<const std::byte> value);
/// Gathers texts of any length, in rank order. For setting up.
std::vector<std::string> all_gather_text(ProcessGroup& group, const std::string& text);

}  // namespace lockstep
