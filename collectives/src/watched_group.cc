#include "watched_group.h"

#include <cstring>
#include <utility>

namespace lockstep {
namespace {

using flight::Call;
using flight::Op;
using flight::Ring;

flight::Dtype dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return flight::Dtype::kF32;
    case at::kDouble:
      return flight::Dtype::kF64;
    case at::kBFloat16:
      return flight::Dtype::kBf16;
    case at::kHalf:
      return flight::Dtype::kF16;
    case at::kInt:
      return flight::Dtype::kI32;
    case at::kLong:
      return flight::Dtype::kI64;
    case at::kByte:
      return flight::Dtype::kU8;
    default:
      return flight::Dtype::kOther;
  }
}

flight::Reduction reduction_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kMax:
      return flight::Reduction::kMax;
    case ReduceOp::kMin:
      return flight::Reduction::kMin;
    case ReduceOp::kSum:
      break;
  }
  return flight::Reduction::kSum;
}

// A call that blocks, from its beginning to its end; one that throws stays open.
class Blocking {
 public:
  Blocking(Ring& ring, Ring::Group& group, const Call& call) : ring_(ring), ticket_(ring.begin(group, call)) {
    ring_.wait(ticket_);
  }
  ~Blocking() { ring_.leave(ticket_); }
  void done() { ring_.done(ticket_); }
  Blocking(const Blocking&) = delete;
  Blocking& operator=(const Blocking&) = delete;

 private:
  Ring& ring_;
  const uint64_t ticket_;
};

class WatchedShown : public Shown {
 public:
  WatchedShown(std::unique_ptr<Shown> inner, Ring& ring, Ring::Group& group, uint64_t ticket)
      : inner_(std::move(inner)), ring_(ring), group_(group), ticket_(ticket) {}

  bool poll() override {
    if (!inner_->poll()) return false;
    note_done();
    return true;
  }
  void wait() override {
    if (!is_done_) ring_.wait(ticket_);
    try {
      inner_->wait();
    } catch (...) {
      ring_.leave(ticket_);
      throw;
    }
    note_done();
  }
  const void* data(int rank, size_t index) const override { return inner_->data(rank, index); }
  void done() override {
    Blocking call(ring_, group_, {.op = Op::kShowDone});
    inner_->done();
    call.done();
  }

 private:
  void note_done() {
    if (!std::exchange(is_done_, true)) ring_.done(ticket_);
  }

  std::unique_ptr<Shown> inner_;
  Ring& ring_;
  Ring::Group& group_;
  const uint64_t ticket_;
  bool is_done_ = false;
};

class WatchedGroup : public ProcessGroup {
 public:
  WatchedGroup(std::unique_ptr<ProcessGroup> inner, std::shared_ptr<Ring> ring, std::unique_ptr<Ring::Group> group)
      : ring_(std::move(ring)), group_(std::move(group)), inner_(std::move(inner)) {
    set_control_timeout(inner_->control_timeout());
  }

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  const std::string& name() const override { return inner_->name(); }
  const char* backend() const override { return inner_->backend(); }

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kAllReduce, dtype_of(tensor), reduction_of(op), tensor.numel()});
    return watched(inner_->all_reduce(std::move(tensor), op, timeout), ticket);
  }
  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kReduceScatter, dtype_of(input), reduction_of(op), input.numel()});
    return watched(inner_->reduce_scatter(std::move(output), std::move(input), op, timeout), ticket);
  }
  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kAllGather, dtype_of(output), flight::Reduction::kNone, output.numel()});
    return watched(inner_->all_gather(std::move(output), std::move(input), timeout), ticket);
  }
  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kAllGather, dtype_of(output), flight::Reduction::kNone, output.numel()});
    return watched(inner_->all_gather_uneven(std::move(output), std::move(input), counts, timeout), ticket);
  }
  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kAllToAll, dtype_of(output), flight::Reduction::kNone, 0});  // shares differ
    return watched(inner_->all_to_all(std::move(output), std::move(input), receive_counts, send_counts, timeout),
                   ticket);
  }
  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kBroadcast, dtype_of(tensor), flight::Reduction::kNone, tensor.numel(), root});
    return watched(inner_->broadcast(std::move(tensor), root, timeout), ticket);
  }
  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kSend, dtype_of(tensor), flight::Reduction::kNone, tensor.numel(), to});
    return watched(inner_->send(std::move(tensor), to, tag, timeout), ticket);
  }
  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override {
    const uint64_t ticket = begin({Op::kReceive, dtype_of(tensor), flight::Reduction::kNone, tensor.numel(), from});
    return watched(inner_->recv(std::move(tensor), from, tag, timeout), ticket);
  }
  void barrier(Milliseconds timeout) override {
    Blocking call(*ring_, *group_, {.op = Op::kBarrier});
    inner_->barrier(timeout);
    call.done();
  }

  at::Tensor empty_mapped(int64_t numel, at::TensorOptions options) override {
    return inner_->empty_mapped(numel, options);
  }
  std::unique_ptr<Shown> show(const std::vector<at::Tensor>& tensors, Milliseconds timeout) override {
    const uint64_t ticket = begin({.op = Op::kShow});
    std::unique_ptr<Shown> shown = inner_->show(tensors, timeout);
    if (shown) return std::make_unique<WatchedShown>(std::move(shown), *ring_, *group_, ticket);
    ring_->done(ticket);  // this back end cannot, on no rank
    return nullptr;
  }

  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override {
    Blocking call(*ring_, *group_, {.op = Op::kSplit});
    std::unique_ptr<ProcessGroup> child = inner_->split(color, key, name);
    std::vector<int32_t> members(static_cast<size_t>(child->size()), ring_->header().rank);
    if (child->size() > 1) {
      const std::string all = all_gather_bytes(*child, std::as_bytes(std::span(members.data(), 1)));
      std::memcpy(members.data(), all.data(), all.size());
    }
    call.done();
    auto group = ring_->add_child(*group_, color, name, std::move(members));
    return std::make_unique<WatchedGroup>(std::move(child), ring_, std::move(group));
  }

  void close() override {
    Blocking call(*ring_, *group_, {.op = Op::kClose});
    inner_->close();
    call.done();
  }
  void abort() noexcept override { inner_->abort(); }
  Ring* flight_ring() const override { return ring_.get(); }

 private:
  uint64_t begin(const Call& call) { return ring_->begin(*group_, call); }
  Work watched(Work work, uint64_t ticket) {
    work.watch(*ring_, ticket);
    return work;
  }

  std::shared_ptr<Ring> ring_;
  std::unique_ptr<Ring::Group> group_;
  std::unique_ptr<ProcessGroup> inner_;
};

}  // namespace

std::unique_ptr<ProcessGroup> watch_world(std::unique_ptr<ProcessGroup> world, std::shared_ptr<flight::Ring> ring,
                                          std::unique_ptr<flight::Ring::Group> group) {
  return std::make_unique<WatchedGroup>(std::move(world), std::move(ring), std::move(group));
}

}  // namespace lockstep
