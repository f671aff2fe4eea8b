#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include <sched.h>

#include <ATen/Functions.h>

#include <lockstep/collectives/mpi_group.h>

#include "call_checks.h"
#include "mpi_handles.h"

namespace lockstep {
namespace {

constexpr int kUserTags = 1 << 20;  // send/recv tags; collectives use those above, one a call
constexpr int kCollectiveTags = 1 << 20;
constexpr int kSpinsBeforeYield = 64;  // a peer that is about to answer is cheaper to wait for than a switch

// Elementwise sums, maxima and minima of the 16-bit floats, which MPI has no types for.
template <typename T, ReduceOp kOp>
void reduce_halves(void* in, void* inout, int* n, MPI_Datatype*) {
  const auto* a = static_cast<const T*>(in);
  auto* b = static_cast<T*>(inout);
  for (int i = 0; i < *n; ++i) {
    const float x = a[i], y = b[i];
    b[i] = static_cast<T>(kOp == ReduceOp::kSum ? x + y : kOp == ReduceOp::kMax ? std::max(x, y) : std::min(x, y));
  }
}

MPI_Datatype mpi_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return MPI_FLOAT;
    case at::kDouble:
      return MPI_DOUBLE;
    case at::kBFloat16:
    case at::kHalf:
      return MPI_UINT16_T;
    case at::kInt:
      return MPI_INT32_T;
    case at::kLong:
      return MPI_INT64_T;
    case at::kByte:
      return MPI_UINT8_T;
    default:
      throw CheckFailed(std::string("no collective for dtype ") + at::toString(type) +
                        "; f32, f64, bf16, f16, i32, i64, u8 travel");
  }
}

// The six operations of our own, made once and left to MPI_Finalize.
template <typename T>
MPI_Op half_op(ReduceOp op) {
  static const auto make = [](MPI_User_function* function) {
    MPI_Op made = MPI_OP_NULL;
    check_mpi(MPI_Op_create(function, /*commute=*/1, &made), "creating a reduction");
    return made;
  };
  static const MPI_Op sum = make(&reduce_halves<T, ReduceOp::kSum>), max = make(&reduce_halves<T, ReduceOp::kMax>),
                      min = make(&reduce_halves<T, ReduceOp::kMin>);
  return op == ReduceOp::kSum ? sum : op == ReduceOp::kMax ? max : min;
}

MPI_Op mpi_op(at::ScalarType type, ReduceOp op) {
  if (type == at::kBFloat16) return half_op<c10::BFloat16>(op);
  if (type == at::kHalf) return half_op<c10::Half>(op);
  return op == ReduceOp::kSum ? MPI_SUM : op == ReduceOp::kMax ? MPI_MAX : MPI_MIN;
}

// MPI may go on writing into tensors whose operation was given up: they stay until the process ends.
void keep_for_ever(std::vector<at::Tensor> tensors) {
  static std::mutex mutex;
  static auto& kept = *new std::vector<at::Tensor>;  // never destroyed, MPI outlives static objects
  const std::lock_guard lock(mutex);
  kept.insert(kept.end(), tensors.begin(), tensors.end());
}

class MpiGroup : public ProcessGroup {
 public:
  MpiGroup(UniqueMpiComm comm, std::string name, MpiOptions options)
      : comm_(std::move(comm)), name_(std::move(name)), options_(options) {
    check_mpi(MPI_Comm_set_errhandler(comm_.get(), MPI_ERRORS_RETURN), "setting the error handler of " + name_);
    check_mpi(MPI_Comm_rank(comm_.get(), &rank_), "asking for the rank in " + name_);
    check_mpi(MPI_Comm_size(comm_.get(), &size_), "asking for the size of " + name_);
  }
  MpiGroup(const MpiGroup&) = delete;
  MpiGroup& operator=(const MpiGroup&) = delete;
  ~MpiGroup() override {
    if (*broken_) comm_.release();  // freeing is collective; with a peer gone it could wait for ever
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const std::string& name() const override { return name_; }
  const char* backend() const override { return "mpi"; }

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    auto pending = begin("all_reduce" + name_of(op), tensor, timeout);
    pending->keep(tensor);
    for_chunks(tensor.numel(), [&](int64_t offset, int n) {
      check_mpi(MPI_Iallreduce(MPI_IN_PLACE, at(tensor, offset), n, mpi_type(tensor.scalar_type()),
                               mpi_op(tensor.scalar_type(), op), comm_.get(), pending->request()),
                pending->doing());
    });
    return Work(std::move(pending));
  }

  // Pieces straight to their owners, who add them in rank order.
  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    check_reduce_scatter(*this, output, input);
    auto pending = begin("reduce_scatter" + name_of(op), input, timeout);
    const std::vector<int64_t> counts(size_, output.numel());
    at::Tensor pieces = at::empty({size_, output.numel()}, input.options());
    exchange(*pending, pieces, input, counts, counts);
    pending->then([output, pieces, op]() mutable {
      at::Tensor sum = output.view({-1});
      sum.copy_(pieces[0]);
      for (int64_t rank = 1; rank < pieces.size(0); ++rank) {
        if (op == ReduceOp::kSum) sum.add_(pieces[rank]);
        if (op == ReduceOp::kMax) at::maximum_out(sum, sum, pieces[rank]);
        if (op == ReduceOp::kMin) at::minimum_out(sum, sum, pieces[rank]);
      }
    });
    return Work(std::move(pending));
  }

  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const std::vector<int64_t> counts(size_, input.numel());
    return all_gather_uneven(output, input, counts, timeout);
  }

  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    check_all_gather(*this, output, input, counts);
    auto pending = begin("all_gather", output, timeout);
    pending->keep(output);
    pending->keep(input);
    std::vector<int64_t> offsets(size_, 0);
    std::partial_sum(counts.begin(), counts.end() - 1, offsets.begin() + 1);
    copy_bytes(at(output, offsets[rank_]), at(input, 0), input.nbytes());
    for (int step = 1; step < size_; ++step) {  // each step every rank talks to another one
      const int from = (rank_ - step + size_) % size_, to = (rank_ + step) % size_;
      receive(*pending, output, offsets[from], counts[from], from);
      send_to(*pending, input, 0, input.numel(), to);
    }
    return Work(std::move(pending));
  }

  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    check_all_to_all(*this, output, input, receive_counts, send_counts);
    auto pending = begin("all_to_all", input, timeout, /*check_size=*/false);
    exchange(*pending, output, input, receive_counts, send_counts);
    return Work(std::move(pending));
  }

  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    auto pending = begin("broadcast from " + std::to_string(root), tensor, timeout);
    pending->keep(tensor);
    for_chunks(tensor.numel(), [&](int64_t offset, int n) {
      check_mpi(
          MPI_Ibcast(at(tensor, offset), n, mpi_type(tensor.scalar_type()), root, comm_.get(), pending->request()),
          pending->doing());
    });
    return Work(std::move(pending));
  }

  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    auto pending = std::make_unique<Pending>(*this, "send to " + std::to_string(to), timeout, check_tag(tag));
    send_to(*pending, tensor, 0, tensor.numel(), to);
    pending->keep(tensor);
    return Work(std::move(pending));
  }

  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override {
    auto pending = std::make_unique<Pending>(*this, "recv from " + std::to_string(from), timeout, check_tag(tag));
    receive(*pending, tensor, 0, tensor.numel(), from);
    pending->keep(tensor);
    return Work(std::move(pending));
  }

  void barrier(Milliseconds timeout) override {
    auto pending = begin("barrier", at::Tensor(), timeout);
    check_mpi(MPI_Ibarrier(comm_.get(), pending->request()), pending->doing());
    pending->wait();
  }

  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override {
    refuse_if_broken("split");
    MPI_Comm part = MPI_COMM_NULL;
    check_mpi(MPI_Comm_split(comm_.get(), color, key, &part), "splitting " + name_ + " into " + name);
    return std::make_unique<MpiGroup>(UniqueMpiComm(part), name, options_);
  }

  void close() override { *broken_ ? void(comm_.release()) : comm_.reset(); }
  void abort() noexcept override { *broken_ = true; }

 private:
  // Requests in flight, what they keep alive, and what is left to do when they are done.
  class Pending : public Work::Operation {
   public:
    Pending(const MpiGroup& group, const std::string& doing, Milliseconds timeout, int tag)
        : broken_(group.broken_),
          doing_("[rank " + std::to_string(group.rank_) + "/" + std::to_string(group.size_) + "] " + doing +
                 " in group " + group.name_),
          timeout_(timeout),
          deadline_(std::chrono::steady_clock::now() + timeout),
          tag_(tag) {}
    Pending(const Pending&) = delete;
    Pending& operator=(const Pending&) = delete;
    ~Pending() override {
      if (is_done_ || requests_.empty()) return;
      *broken_ = true;
      keep_for_ever(std::move(kept_));
    }

    int tag() const { return tag_; }
    const std::string& doing() const { return doing_; }
    void keep(const at::Tensor& tensor) { kept_.push_back(tensor); }
    void then(std::function<void()> finish) { finish_ = std::move(finish); }
    MPI_Request* request() {  // valid until the next one is asked for
      requests_.push_back(MPI_REQUEST_NULL);
      return &requests_.back();
    }

    bool poll() override {
      if (*broken_) throw CollectiveError(doing_ + " was aborted");
      int done = 0;
      const int code = MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, MPI_STATUSES_IGNORE);
      if (code != MPI_SUCCESS) *broken_ = true;
      check_mpi(code, doing_);
      is_done_ = done != 0;
      if (is_done_ && finish_) std::exchange(finish_, nullptr)();
      return is_done_;
    }

    void wait() override {
      std::chrono::steady_clock::time_point idle_since{};
      for (int64_t spins = 0; !poll(); ++spins) {
        if (spins < kSpinsBeforeYield) continue;
        sched_yield();
        if (spins % 64 != 0) continue;
        const auto now = std::chrono::steady_clock::now();
        if (now > deadline_) {
          *broken_ = true;
          throw CollectiveError(
              doing_ + " timed out after " + std::to_string(timeout_.count()) +
              " ms. Mend: look for the first ERROR of another rank; run again to go on from the last checkpoint");
        }
        if (spins == kSpinsBeforeYield) idle_since = now;
        // Who comes this late is in no hurry; others want the core.
        if (now - idle_since > std::chrono::seconds(1)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }

   private:
    std::shared_ptr<std::atomic<bool>> broken_;  // the group's
    std::string doing_;
    Milliseconds timeout_;
    std::chrono::steady_clock::time_point deadline_;
    int tag_;
    bool is_done_ = false;
    std::vector<MPI_Request> requests_;
    std::vector<at::Tensor> kept_;
    std::function<void()> finish_;
  };

  std::unique_ptr<Pending> begin(const std::string& operation, const at::Tensor& tensor, Milliseconds timeout,
                                 bool check_size = true) {
    refuse_if_broken(operation);
    std::string doing = operation;
    if (tensor.defined()) doing += " of " + std::to_string(tensor.numel()) + " " + at::toString(tensor.scalar_type());
    if (options_.check_collectives)
      check_agreement(check_size ? doing : operation + " of " + at::toString(tensor.scalar_type()), timeout);
    const int tag = kUserTags + static_cast<int>(sequence_++ % kCollectiveTags);
    return std::make_unique<Pending>(*this, doing + " (call " + std::to_string(sequence_) + ")", timeout, tag);
  }

  void refuse_if_broken(const std::string& operation) const {
    if (*broken_) {
      throw CollectiveError("group " + name_ + " is unusable after an earlier error; " + operation +
                            " was not started");
    }
  }

  void check_agreement(const std::string& doing, Milliseconds timeout) {
    constexpr int64_t kWidth = 120;
    at::Tensor mine = at::zeros({kWidth}, at::kByte), all = at::empty({size_, kWidth}, at::kByte);
    std::memcpy(mine.data_ptr(), doing.data(), std::min<size_t>(doing.size(), kWidth - 1));
    Pending comparing(*this, "comparing " + doing, timeout, 0);
    comparing.keep(mine);
    comparing.keep(all);
    check_mpi(MPI_Iallgather(mine.data_ptr(), kWidth, MPI_CHAR, all.data_ptr(), kWidth, MPI_CHAR, comm_.get(),
                             comparing.request()),
              comparing.doing());
    comparing.wait();
    for (int rank = 0; rank < size_; ++rank) {
      const auto *ours = static_cast<const char*>(mine.data_ptr()),
                 *theirs = static_cast<const char*>(all.data_ptr()) + rank * kWidth;
      if (std::strcmp(theirs, ours) != 0) {
        *broken_ = true;
        throw ShapeMismatch("group " + name_ + ": rank " + std::to_string(rank_) + " calls " + ours + " while rank " +
                            std::to_string(rank) + " calls " + theirs);
      }
    }
  }

  static int check_tag(int tag) {
    LOCKSTEP_CHECK(tag >= 0 && tag < kUserTags) << "tag " << tag << " is outside 0 .. " << kUserTags - 1;
    return tag;
  }

  static void* at(const at::Tensor& tensor, int64_t offset) {
    return static_cast<char*>(tensor.data_ptr()) + offset * static_cast<int64_t>(tensor.element_size());
  }

  static void copy_bytes(void* to, const void* from, size_t bytes) {
    if (to != from && bytes > 0) std::memmove(to, from, bytes);
  }

  template <typename Call>
  void for_chunks(int64_t numel, Call call) const {
    for (int64_t offset = 0; offset < numel; offset += options_.call_limit_elements)
      call(offset, static_cast<int>(std::min(options_.call_limit_elements, numel - offset)));
  }

  void send_to(Pending& pending, const at::Tensor& tensor, int64_t begin, int64_t numel, int to) {
    for_chunks(numel, [&](int64_t offset, int n) {
      check_mpi(MPI_Isend(at(tensor, begin + offset), n, mpi_type(tensor.scalar_type()), to, pending.tag(), comm_.get(),
                          pending.request()),
                pending.doing());
    });
  }

  void receive(Pending& pending, const at::Tensor& tensor, int64_t begin, int64_t numel, int from) {
    for_chunks(numel, [&](int64_t offset, int n) {
      check_mpi(MPI_Irecv(at(tensor, begin + offset), n, mpi_type(tensor.scalar_type()), from, pending.tag(),
                          comm_.get(), pending.request()),
                pending.doing());
    });
  }

  // The all-to-all itself: piece q of `input` to rank q, as many sends as peers, each step between other pairs.
  void exchange(Pending& pending, const at::Tensor& output, const at::Tensor& input,
                std::span<const int64_t> receive_counts, std::span<const int64_t> send_counts) {
    pending.keep(output);
    pending.keep(input);
    std::vector<int64_t> to_offsets(size_, 0), from_offsets(size_, 0);
    std::partial_sum(send_counts.begin(), send_counts.end() - 1, to_offsets.begin() + 1);
    std::partial_sum(receive_counts.begin(), receive_counts.end() - 1, from_offsets.begin() + 1);
    for (int step = 1; step < size_; ++step) {
      const int from = (rank_ - step + size_) % size_, to = (rank_ + step) % size_;
      receive(pending, output, from_offsets[from], receive_counts[from], from);
      send_to(pending, input, to_offsets[to], send_counts[to], to);
    }
    copy_bytes(at(output, from_offsets[rank_]), at(input, to_offsets[rank_]),
               static_cast<size_t>(send_counts[rank_]) * input.element_size());
  }

  UniqueMpiComm comm_;
  std::string name_;
  MpiOptions options_;
  int rank_ = 0, size_ = 1;
  int64_t sequence_ = 0;
  std::shared_ptr<std::atomic<bool>> broken_ = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace

std::unique_ptr<ProcessGroup> make_mpi_world(MpiOptions options) {
  MPI_Comm copy = MPI_COMM_NULL;
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &copy), "copying the world communicator");
  return std::make_unique<MpiGroup>(UniqueMpiComm(copy), "world", options);
}

}  // namespace lockstep
