#pragma once

#include <lockstep/collectives/process_group.h>

namespace lockstep::test {

/// Hands every call to another group: a base for groups that watch, count or fail.
class ForwardingGroup : public ProcessGroup {
 public:
  explicit ForwardingGroup(ProcessGroup& inner) : inner_(inner) {}

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  const std::string& name() const override { return inner_.name(); }
  const char* backend() const override { return inner_.backend(); }
  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    return inner_.all_reduce(std::move(tensor), op, timeout);
  }
  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    return inner_.reduce_scatter(std::move(output), std::move(input), op, timeout);
  }
  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    return inner_.all_gather(std::move(output), std::move(input), timeout);
  }
  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    return inner_.all_gather_uneven(std::move(output), std::move(input), counts, timeout);
  }
  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    return inner_.all_to_all(std::move(output), std::move(input), receive_counts, send_counts, timeout);
  }
  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    return inner_.broadcast(std::move(tensor), root, timeout);
  }
  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    return inner_.send(std::move(tensor), to, tag, timeout);
  }
  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override {
    return inner_.recv(std::move(tensor), from, tag, timeout);
  }
  void barrier(Milliseconds timeout) override { inner_.barrier(timeout); }
  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override {
    return inner_.split(color, key, name);
  }
  void close() override { inner_.close(); }
  void abort() noexcept override { inner_.abort(); }

 private:
  ProcessGroup& inner_;
};

}  // namespace lockstep::test
