#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "../sharding/forwarding_group.h"

namespace lockstep::test {

/// A rank's cable: what it sends or receives goes through it in the order of the calls, at so many nanoseconds a byte.
class SlowLink {
 public:
  using Clock = std::chrono::steady_clock;

  explicit SlowLink(double ns_per_byte) : ns_per_byte_(ns_per_byte) {}

  /// @return when a transfer that starts now is through.
  Clock::time_point carry(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    bytes_ += bytes;
    const auto duration = std::chrono::nanoseconds(static_cast<int64_t>(ns_per_byte_ * static_cast<double>(bytes)));
    return free_at_ = std::max(free_at_, Clock::now()) + duration;
  }
  int64_t bytes() const {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

 private:
  double ns_per_byte_;
  mutable std::mutex mutex_;
  Clock::time_point free_at_{};
  int64_t bytes_ = 0;
};

/// Another group over a slow link: no operation ends before its bytes are through, and waiting for that takes no CPU.
/// Groups split from it share the link.
class SlowGroup : public ForwardingGroup {
 public:
  SlowGroup(ProcessGroup& inner, std::shared_ptr<SlowLink> link) : ForwardingGroup(inner), link_(std::move(link)) {}

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    const int64_t bytes = 2 * bytes_of(tensor) * (size() - 1) / size();
    return slowed(ForwardingGroup::all_reduce(std::move(tensor), op, timeout), bytes);
  }
  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    const int64_t bytes = bytes_of(input) - bytes_of(output);
    return slowed(ForwardingGroup::reduce_scatter(std::move(output), std::move(input), op, timeout), bytes);
  }
  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const int64_t bytes = bytes_of(output) - bytes_of(input);
    return slowed(ForwardingGroup::all_gather(std::move(output), std::move(input), timeout), bytes);
  }
  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    const int64_t bytes = bytes_of(output) - bytes_of(input);
    return slowed(ForwardingGroup::all_gather_uneven(std::move(output), std::move(input), counts, timeout), bytes);
  }
  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    const auto item = static_cast<int64_t>(output.itemsize());
    const int64_t bytes = std::max(bytes_of(output) - receive_counts[rank()] * item,  // both ways at once
                                   bytes_of(input) - send_counts[rank()] * item);
    return slowed(
        ForwardingGroup::all_to_all(std::move(output), std::move(input), receive_counts, send_counts, timeout), bytes);
  }
  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    const int64_t bytes = bytes_of(tensor);
    return slowed(ForwardingGroup::broadcast(std::move(tensor), root, timeout), bytes);
  }
  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    const int64_t bytes = bytes_of(tensor);
    return slowed(ForwardingGroup::send(std::move(tensor), to, tag, timeout), bytes);
  }
  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override {
    const int64_t bytes = bytes_of(tensor);
    return slowed(ForwardingGroup::recv(std::move(tensor), from, tag, timeout), bytes);
  }
  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override {
    return std::unique_ptr<ProcessGroup>(new SlowGroup(ForwardingGroup::make_part(color, key, name), link_));
  }

 private:
  SlowGroup(std::unique_ptr<ProcessGroup> inner, std::shared_ptr<SlowLink> link)
      : ForwardingGroup(*inner), owned_(std::move(inner)), link_(std::move(link)) {}

  class Operation : public Work::Operation {
   public:
    Operation(Work inner, SlowLink::Clock::time_point end) : inner_(std::move(inner)), end_(end) {}
    void wait() override {
      inner_.wait();
      std::this_thread::sleep_until(end_);
    }
    bool poll() override { return inner_.poll() && SlowLink::Clock::now() >= end_; }

   private:
    Work inner_;
    SlowLink::Clock::time_point end_;
  };

  static int64_t bytes_of(const at::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }
  Work slowed(Work work, int64_t bytes) const {
    return Work(std::make_unique<Operation>(std::move(work), link_->carry(bytes)));
  }

  std::unique_ptr<ProcessGroup> owned_;
  std::shared_ptr<SlowLink> link_;
};

}  // namespace lockstep::test
