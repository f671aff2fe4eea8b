#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>
#include <tuple>

#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/minimum.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/local_group.h>

#include "call_checks.h"

namespace lockstep {
namespace {

// One collective call as its ranks made it. Each brings a copy of its input, so that nobody waits for others to have
// read.
struct Round {
  struct Call {
    std::string operation;  // with everything that must agree, e.g. "all_reduce (sum) of 5 Float"
    at::Tensor input;
    std::vector<int64_t> counts;
  };
  std::vector<Call> calls;
  int arrived = 0;
};

using Deadline = std::chrono::steady_clock::time_point;

// What the threads of one group share.
struct Shared {
  explicit Shared(int size, std::string name) : size(size), name(std::move(name)), is_lost(size, false) {}
  const int size;
  const std::string name;
  std::mutex mutex;
  std::condition_variable changed;
  std::map<int64_t, std::shared_ptr<Round>> rounds;  // not yet complete, by sequence number
  std::map<std::tuple<int, int, int>, std::deque<at::Tensor>> mail;
  std::map<std::pair<int64_t, int>, std::shared_ptr<Shared>> children;  // by (split number, color)
  bool aborted = false;
  std::vector<bool> is_lost;  // ranks whose wait was in vain: to them the group is unusable

  void abort() {
    std::vector<std::shared_ptr<Shared>> below;
    {
      const std::lock_guard lock(mutex);
      aborted = true;
      for (auto& [key, child] : children) below.push_back(child);
    }
    changed.notify_all();
    for (auto& child : below) child->abort();
  }
};

std::string describe(const std::string& operation, const at::Tensor& tensor) {
  return operation + " of " + std::to_string(tensor.numel()) + " " + at::toString(tensor.scalar_type());
}

class LocalGroup : public ProcessGroup {
 public:
  LocalGroup(std::shared_ptr<Shared> shared, int rank) : shared_(std::move(shared)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return shared_->size; }
  const std::string& name() const override { return shared_->name; }
  const char* backend() const override { return "local"; }

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    return start(describe("all_reduce" + name_of(op), tensor), tensor, {}, timeout,
                 [tensor, op](const Round& round, int) { tensor.copy_(reduced(round, op)); });
  }

  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    check_reduce_scatter(*this, output, input);
    return start(
        describe("reduce_scatter" + name_of(op), input), input, {}, timeout,
        [output, op](const Round& round, int rank) {
          output.view({-1}).copy_(reduced(round, op).view({-1}).narrow(0, rank * output.numel(), output.numel()));
        });
  }

  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const std::vector<int64_t> counts(size(), input.numel());
    return all_gather_uneven(output, input, counts, timeout);
  }

  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    check_all_gather(*this, output, input, counts);
    return start(describe("all_gather", output), input, {}, timeout, [output](const Round& round, int) {
      int64_t offset = 0;
      for (const auto& call : round.calls) {
        output.view({-1}).narrow(0, offset, call.input.numel()).copy_(call.input.view({-1}));
        offset += call.input.numel();
      }
    });
  }

  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    check_all_to_all(*this, output, input, receive_counts, send_counts);
    return start(std::string("all_to_all of ") + at::toString(input.scalar_type()), input,
                 {send_counts.begin(), send_counts.end()}, timeout,
                 [output, wanted = std::vector<int64_t>(receive_counts.begin(), receive_counts.end())](
                     const Round& round, int rank) {
                   int64_t offset = 0;
                   for (size_t from = 0; from < round.calls.size(); ++from) {
                     const auto& call = round.calls[from];
                     const int64_t begin = std::accumulate(call.counts.begin(), call.counts.begin() + rank, int64_t{0});
                     if (call.counts[rank] != wanted[from]) {
                       throw ShapeMismatch("all_to_all: rank " + std::to_string(from) + " sends " +
                                           std::to_string(call.counts[rank]) + " elements to rank " +
                                           std::to_string(rank) + ", which expects " + std::to_string(wanted[from]));
                     }
                     output.view({-1})
                         .narrow(0, offset, wanted[from])
                         .copy_(call.input.view({-1}).narrow(0, begin, wanted[from]));
                     offset += wanted[from];
                   }
                 });
  }

  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    return start(describe("broadcast from " + std::to_string(root), tensor), tensor, {}, timeout,
                 [tensor, root](const Round& round, int) { tensor.copy_(round.calls[root].input); });
  }

  Work send(at::Tensor tensor, int to, int tag, Milliseconds) override {
    {
      const std::lock_guard lock(shared_->mutex);
      shared_->mail[{rank_, to, tag}].push_back(tensor.clone());
    }
    shared_->changed.notify_all();
    return {};
  }

  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override;

  void barrier(Milliseconds timeout) override {
    start("barrier", at::empty({0}, at::kByte), {}, timeout, [](const Round&, int) {}).wait();
  }

  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override;
  void close() override {}
  void abort() noexcept override { shared_->abort(); }

  using Finish = std::function<void(const Round&, int rank)>;

 private:
  class Collective;
  class Receive;

  static at::Tensor reduced(const Round& round, ReduceOp op) {  // in rank order
    at::Tensor result = round.calls[0].input.clone();
    for (size_t rank = 1; rank < round.calls.size(); ++rank) {
      const at::Tensor& term = round.calls[rank].input;
      if (op == ReduceOp::kSum) result.add_(term);
      if (op == ReduceOp::kMax) result = at::maximum(result, term);
      if (op == ReduceOp::kMin) result = at::minimum(result, term);
    }
    return result;
  }

  Work start(const std::string& operation, const at::Tensor& input, std::vector<int64_t> counts, Milliseconds timeout,
             Finish finish);

  std::shared_ptr<Shared> shared_;
  int rank_;
  int64_t sequence_ = 0;
};

class LocalGroup::Collective : public Work::Operation {
 public:
  Collective(std::shared_ptr<Shared> shared, std::shared_ptr<Round> round, int rank, Milliseconds timeout,
             Finish finish)
      : shared_(std::move(shared)),
        round_(std::move(round)),
        rank_(rank),
        timeout_(timeout),
        deadline_(std::chrono::steady_clock::now() + timeout),
        finish_(std::move(finish)) {}

  void wait() override {
    {
      std::unique_lock lock(shared_->mutex);
      const bool woken = shared_->changed.wait_until(
          lock, deadline_, [&] { return shared_->aborted || round_->arrived == shared_->size; });
      if (round_->arrived < shared_->size) {
        shared_->is_lost[rank_] = true;
        throw CollectiveError(complaint(woken));
      }
    }
    for (int rank = 0; rank < shared_->size; ++rank) {
      if (round_->calls[rank].operation != round_->calls[rank_].operation) {
        throw ShapeMismatch("group " + shared_->name + ": rank " + std::to_string(rank_) + " calls " +
                            round_->calls[rank_].operation + " while rank " + std::to_string(rank) + " calls " +
                            round_->calls[rank].operation);
      }
    }
    finish_(*round_, rank_);
  }

  bool poll() override {
    {
      const std::lock_guard lock(shared_->mutex);
      if (round_->arrived < shared_->size && !shared_->aborted) return false;
    }
    wait();
    return true;
  }

 private:
  std::string complaint(bool aborted) const {
    std::string absent;
    for (int rank = 0; rank < shared_->size; ++rank) {
      if (round_->calls[rank].operation.empty()) absent += (absent.empty() ? "" : ", ") + std::to_string(rank);
    }
    return "[rank " + std::to_string(rank_) + "/" + std::to_string(shared_->size) + "] " +
           round_->calls[rank_].operation + " in group " + shared_->name +
           (aborted ? " was aborted" : " timed out after " + std::to_string(timeout_.count()) + " ms") + ": rank " +
           absent + " did not arrive";
  }

  std::shared_ptr<Shared> shared_;
  std::shared_ptr<Round> round_;
  int rank_;
  Milliseconds timeout_;
  Deadline deadline_;
  Finish finish_;
};

class LocalGroup::Receive : public Work::Operation {
 public:
  Receive(std::shared_ptr<Shared> shared, std::tuple<int, int, int> address, at::Tensor tensor, Milliseconds timeout)
      : shared_(std::move(shared)),
        address_(address),
        tensor_(std::move(tensor)),
        deadline_(std::chrono::steady_clock::now() + timeout) {}

  void wait() override {
    at::Tensor letter;
    {
      std::unique_lock lock(shared_->mutex);
      auto& box = shared_->mail[address_];
      shared_->changed.wait_until(lock, deadline_, [&] { return shared_->aborted || !box.empty(); });
      if (box.empty()) {
        shared_->is_lost[std::get<1>(address_)] = true;
        throw CollectiveError("[rank " + std::to_string(std::get<1>(address_)) + "/" + std::to_string(shared_->size) +
                              "] recv in group " + shared_->name + ": nothing came from rank " +
                              std::to_string(std::get<0>(address_)));
      }
      letter = box.front();
      box.pop_front();
    }
    tensor_.copy_(letter.view(tensor_.sizes()));
  }

  bool poll() override {
    {
      const std::lock_guard lock(shared_->mutex);
      if (shared_->mail[address_].empty() && !shared_->aborted) return false;
    }
    wait();
    return true;
  }

 private:
  std::shared_ptr<Shared> shared_;
  std::tuple<int, int, int> address_;
  at::Tensor tensor_;
  Deadline deadline_;
};

Work LocalGroup::recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) {
  return Work(std::make_unique<Receive>(shared_, std::tuple{from, rank_, tag}, tensor, timeout));
}

Work LocalGroup::start(const std::string& operation, const at::Tensor& input, std::vector<int64_t> counts,
                       Milliseconds timeout, Finish finish) {
  std::shared_ptr<Round> round;
  {
    const std::lock_guard lock(shared_->mutex);
    if (shared_->aborted || shared_->is_lost[rank_]) {
      throw CollectiveError("group " + shared_->name + " is unusable after an earlier error; " + operation +
                            " was not started");
    }
    auto& slot = shared_->rounds[sequence_];
    if (!slot) slot = std::make_shared<Round>(Round{std::vector<Round::Call>(size()), 0});
    round = slot;
    round->calls[rank_] = {operation, input.clone(), std::move(counts)};
    if (++round->arrived == size()) shared_->rounds.erase(sequence_);
  }
  ++sequence_;
  shared_->changed.notify_all();
  return Work(std::make_unique<Collective>(shared_, std::move(round), rank_, timeout, std::move(finish)));
}

std::unique_ptr<ProcessGroup> LocalGroup::make_part(int color, int key, const std::string& name) {
  const int64_t number = sequence_;
  struct Choice {
    int color, key;
  };
  const Choice mine{color, key};
  const std::string all = all_gather_bytes(*this, std::as_bytes(std::span(&mine, 1)));
  std::vector<std::pair<int, int>> members;  // (key, rank)
  for (int rank = 0; rank < size(); ++rank) {
    Choice choice{};
    std::memcpy(&choice, all.data() + rank * sizeof(Choice), sizeof(Choice));
    if (choice.color == color) members.emplace_back(choice.key, rank);
  }
  std::sort(members.begin(), members.end());
  const auto place = std::find(members.begin(), members.end(), std::pair{key, rank_}) - members.begin();
  const std::lock_guard lock(shared_->mutex);
  if (shared_->aborted) throw CollectiveError("group " + shared_->name + " was aborted before it was split");
  auto& child = shared_->children[{number, color}];
  if (!child) child = std::make_shared<Shared>(static_cast<int>(members.size()), name);
  return std::make_unique<LocalGroup>(child, static_cast<int>(place));
}

}  // namespace

std::vector<std::unique_ptr<ProcessGroup>> make_local_world(int world_size) {
  const auto shared = std::make_shared<Shared>(world_size, "world");
  std::vector<std::unique_ptr<ProcessGroup>> groups;
  groups.reserve(world_size);
  for (int rank = 0; rank < world_size; ++rank) groups.push_back(std::make_unique<LocalGroup>(shared, rank));
  return groups;
}

void run_local_ranks(int world_size, const std::function<void(ProcessGroup&)>& body) {
  const auto groups = make_local_world(world_size);
  std::mutex mutex;
  std::exception_ptr first;
  std::vector<std::thread> threads;
  threads.reserve(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    threads.emplace_back([&, rank] {
      configure_arithmetic(1);
      try {
        body(*groups[rank]);
      } catch (...) {
        {
          const std::lock_guard lock(mutex);
          if (!first) first = std::current_exception();
        }
        groups[rank]->abort();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace lockstep
