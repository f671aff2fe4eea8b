#include "nccl_group.h"

#include <algorithm>
#include <condition_variable>
#include <iterator>
#include <numeric>
#include <optional>
#include <thread>
#include <vector>

#include <sched.h>

#include <ATen/ops/zeros.h>

#include <lockstep/base/error.h>

#include "call_checks.h"
#include "nccl_communicator.h"
#include "stream_progress.h"

namespace lockstep {
namespace {

constexpr int kSpinsBeforeSleep = 64;
constexpr std::chrono::microseconds kNap{50};

using Task = NcclCommunicator::Task;

ncclDataType_t nccl_type(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return ncclFloat32;
    case at::kDouble:
      return ncclFloat64;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kHalf:
      return ncclFloat16;
    case at::kInt:
      return ncclInt32;
    case at::kLong:
      return ncclInt64;
    case at::kByte:
      return ncclUint8;
    default:
      throw CheckFailed(std::string("no collective for dtype ") + at::toString(type) +
                        "; f32, f64, bf16, f16, i32, i64, u8 travel");
  }
}

ncclRedOp_t nccl_op(ReduceOp op) { return op == ReduceOp::kSum ? ncclSum : op == ReduceOp::kMax ? ncclMax : ncclMin; }

// The device that is current in this scope; the caller's own comes back after it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "asking for the current device");
    if (before_ != device) check_cuda(cudaSetDevice(device), "choosing device " + std::to_string(device));
    changed_ = before_ != device;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

UniqueEvent record_event(cudaStream_t stream, const std::string& doing) {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), doing);
  UniqueEvent made(event);
  check_cuda(cudaEventRecord(event, stream), doing);
  return made;
}

// The first error of a row of NCCL calls that go as one; the group is ended whatever happened in it.
class GroupCall {
 public:
  GroupCall() { add(ncclGroupStart()); }
  void add(ncclResult_t code) {
    if (first_ == ncclSuccess) first_ = code;
  }
  ncclResult_t end() {
    const ncclResult_t code = ncclGroupEnd();
    return first_ != ncclSuccess && first_ != ncclInProgress ? first_ : code;
  }

 private:
  ncclResult_t first_ = ncclSuccess;
};

// A host tensor's place on the device while it travels. Its memory is the stream's: freed in order.
class Staged {
 public:
  Staged(at::Tensor host, bool comes_back, cudaStream_t stream)
      : host_(std::move(host)), comes_back_(comes_back), stream_(stream) {}
  Staged(Staged&& other) noexcept
      : host_(std::move(other.host_)),
        comes_back_(other.comes_back_),
        stream_(other.stream_),
        device_(std::exchange(other.device_, nullptr)) {}
  Staged(const Staged&) = delete;
  Staged& operator=(Staged&&) = delete;
  Staged& operator=(const Staged&) = delete;
  ~Staged() {
    if (device_ != nullptr) cudaFreeAsync(device_, stream_);
  }

  void* bring(const std::string& doing) {
    check_cuda(cudaMallocAsync(&device_, host_.nbytes(), stream_), doing);
    check_cuda(cudaMemcpyAsync(device_, host_.data_ptr(), host_.nbytes(), cudaMemcpyHostToDevice, stream_), doing);
    return device_;
  }
  // After the event, and beside the stream: operations that come later may be waiting in it for a peer.
  void fetch(cudaStream_t beside, const std::string& doing) {
    if (!comes_back_) return;
    check_cuda(cudaMemcpyAsync(host_.data_ptr(), device_, host_.nbytes(), cudaMemcpyDeviceToHost, beside), doing);
    check_cuda(cudaStreamSynchronize(beside), doing);
  }

 private:
  at::Tensor host_;
  bool comes_back_;
  cudaStream_t stream_;
  void* device_ = nullptr;
};

class NcclGroup : public ProcessGroup {
 public:
  NcclGroup(std::shared_ptr<NcclCommunicator> comm, const NcclWorld& world, std::shared_ptr<const TorchDevice> torch,
            Milliseconds watch_interval)
      : comm_(std::move(comm)),
        rank_(world.rank),
        size_(world.world_size),
        device_(world.device),
        timeout_(world.timeout),
        torch_(std::move(torch)),
        watch_interval_(watch_interval) {
    set_control_timeout(timeout_);
    const DeviceGuard guard(device_);
    int low = 0, high = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&low, &high), "asking for stream priorities");
    // Before compute, for others wait for what is sent; off the legacy default stream.
    for (UniqueStream* made : {&stream_, &fetches_}) {
      cudaStream_t stream = nullptr;
      check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, high),
                 "making a stream for " + comm_->name());
      made->reset(stream);
    }
    passed_.emplace("making the record of what " + comm_->name() + " has done");
    watcher_ = std::thread([this] { watch(); });
  }

  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;
  ~NcclGroup() override {
    comm_->give_up("it was destroyed");  // before the stream goes: a kernel may wait in it for a peer that is gone
    stop_watching();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const std::string& name() const override { return comm_->name(); }
  const char* backend() const override { return "nccl"; }

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    return reduce_all(describe("all_reduce", tensor), tensor, op, timeout);
  }

  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    check_reduce_scatter(*this, output, input);
    Launch launch = begin(describe("reduce_scatter", input), timeout);
    void* into = launch.brings_back(output);
    const void* from = launch.brings(input);
    return finish(launch, [&](ncclComm_t comm) {
      return ncclReduceScatter(from, into, count(output), nccl_type(input.scalar_type()), nccl_op(op), comm,
                               stream_.get());
    });
  }

  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const std::vector<int64_t> counts(size_, input.numel());
    check_all_gather(*this, output, input, counts);
    Launch launch = begin(describe("all_gather", output), timeout);
    void* into = launch.brings_back(output);
    const void* from = launch.brings(input);
    return finish(launch, [&](ncclComm_t comm) {
      return ncclAllGather(from, into, count(input), nccl_type(input.scalar_type()), comm, stream_.get());
    });
  }

  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    check_all_gather(*this, output, input, counts);
    const std::vector<int64_t> offsets(size_, 0), sent(size_, input.numel());
    return exchange(describe("all_gather", output), output, input, counts, sent, offsets, timeout);
  }

  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    check_all_to_all(*this, output, input, receive_counts, send_counts);
    std::vector<int64_t> offsets(size_, 0);
    std::partial_sum(send_counts.begin(), send_counts.end() - 1, offsets.begin() + 1);
    return exchange(describe("all_to_all", input), output, input, receive_counts, send_counts, offsets, timeout);
  }

  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    check_peer(root);
    Launch launch = begin(describe("broadcast", tensor) + " from " + std::to_string(root), timeout);
    void* data = launch.brings_back(tensor);
    return finish(launch, [&](ncclComm_t comm) {
      return ncclBroadcast(data, data, count(tensor), nccl_type(tensor.scalar_type()), root, comm, stream_.get());
    });
  }

  Work send(at::Tensor tensor, int to, int, Milliseconds timeout) override {
    return transfer(true, tensor, to, describe("send", tensor) + " to " + std::to_string(to), timeout);
  }

  Work recv(at::Tensor tensor, int from, int, Milliseconds timeout) override {
    return transfer(false, tensor, from, describe("recv", tensor) + " from " + std::to_string(from), timeout);
  }

  void barrier(Milliseconds timeout) override {  // a host tensor: its wait() is the host's
    reduce_all("barrier", at::zeros({1}, at::kInt), ReduceOp::kSum, timeout).wait();
  }

  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override {
    LOCKSTEP_CHECK(color >= 0) << "color " << color << " of group " << name << " must not be negative";
    flush();
    const DeviceGuard guard(device_);
    const Task task{where() + "splitting " + this->name() + " into " + name, timeout_};
    auto part = comm_->split(color, key, name, task);
    const NcclWorld world{part->rank(task), part->size(task), device_, timeout_, nullptr};
    return std::make_unique<NcclGroup>(std::move(part), world, torch_, watch_interval_);
  }

  void close() override {
    const Task task{where() + "closing group " + name(), timeout_};
    const DeviceGuard guard(device_);
    if (comm_->is_lost()) batch_ = {};
    flush();
    while (!is_idle()) {
      comm_->check(task);
      std::this_thread::sleep_for(kNap);
    }
    stop_watching();
    comm_->close(task);
  }

  void abort() noexcept override { comm_->abort(); }

 private:
  // One operation on its way through the stream. Shared by its Work and the watcher.
  struct InFlight {
    Task task;
    UniqueEvent done;
    uint32_t mark = 0;  // in passed_
    std::vector<at::Tensor> kept;
    std::vector<Staged> staged;
  };

  // A send or receive that has not left yet.
  struct Transfer {
    bool is_send;
    void* data;
    size_t count;
    ncclDataType_t type;
    int peer;
  };
  // Those that will leave together.
  struct Batch {
    std::shared_ptr<InFlight> operation;
    std::vector<Transfer> transfers;
  };

  // Collects what an operation needs before it may start.
  class Launch {
   public:
    Launch(NcclGroup& group, std::shared_ptr<InFlight> operation) : group_(group), operation_(std::move(operation)) {}
    void* brings(const at::Tensor& tensor) { return take(tensor, false); }
    void* brings_back(const at::Tensor& tensor) { return take(tensor, true); }
    const std::shared_ptr<InFlight>& operation() const { return operation_; }

   private:
    void* take(const at::Tensor& tensor, bool comes_back) { return group_.place(*operation_, tensor, comes_back); }
    NcclGroup& group_;
    std::shared_ptr<InFlight> operation_;
  };

  enum class Progress { kUnderWay, kDone, kLost };

  class Operation : public Work::Operation {
   public:
    Operation(NcclGroup& group, std::shared_ptr<InFlight> operation)
        : group_(group), operation_(std::move(operation)) {}

    bool poll() override {
      group_.flush();
      if (group_.progress(*operation_) == Progress::kUnderWay && !group_.has_failed(*operation_)) return false;
      group_.comm_->check(operation_->task);
      for (Staged& staged : operation_->staged) staged.fetch(group_.fetches_.get(), operation_->task.doing);
      operation_->kept.clear();
      return true;
    }

    void wait() override {
      for (int spins = 0; !poll(); ++spins) {
        if (operation_->staged.empty()) return hand_over();
        spins < kSpinsBeforeSleep ? void(sched_yield()) : std::this_thread::sleep_for(kNap);
      }
    }

   private:
    // From here on the memory is safe without us: the current stream follows, the allocator was told of ours.
    void hand_over() {
      const DeviceGuard guard(group_.device_);
      check_cuda(cudaStreamWaitEvent(group_.torch_->current_stream(), operation_->done.get(), 0),
                 operation_->task.doing);
      operation_->kept.clear();
    }

    NcclGroup& group_;
    std::shared_ptr<InFlight> operation_;
  };

  std::string where() const { return "[rank " + std::to_string(rank_) + "/" + std::to_string(size_) + "] "; }

  static std::string describe(const char* operation, const at::Tensor& tensor) {
    return std::string(operation) + " of " + std::to_string(tensor.numel()) + " " + at::toString(tensor.scalar_type());
  }

  static size_t count(const at::Tensor& tensor) { return static_cast<size_t>(tensor.numel()); }

  static void* address(void* base, const at::Tensor& tensor, int64_t offset) {
    return static_cast<char*>(base) + offset * static_cast<int64_t>(tensor.element_size());
  }

  void check_peer(int peer) const {
    LOCKSTEP_CHECK(peer >= 0 && peer < size_) << "group " << name() << " of " << size_ << " has no rank " << peer;
  }

  std::shared_ptr<InFlight> describe_call(const std::string& operation, Milliseconds timeout) {
    auto call = std::make_shared<InFlight>();
    call->task = {where() + operation + " (call " + std::to_string(++sequence_) + ") in group " + name(), timeout};
    comm_->check(call->task);
    return call;
  }

  // The device address of a tensor, its memory kept until the stream has passed; a host tensor's copy instead.
  void* place(InFlight& operation, const at::Tensor& tensor, bool comes_back) {
    LOCKSTEP_CHECK(tensor.is_contiguous()) << operation.task.doing << ": the tensor is not contiguous";
    nccl_type(tensor.scalar_type());  // refused before anything is under way
    operation.kept.push_back(tensor);
    if (torch_->holds(tensor)) {
      torch_->keep_for(tensor, stream_.get());
      return tensor.data_ptr();
    }
    LOCKSTEP_CHECK(tensor.is_cpu()) << operation.task.doing << ": the tensor is on " << tensor.device()
                                    << ", the group on cuda:" << device_;
    if (tensor.numel() == 0) return nullptr;
    const DeviceGuard guard(device_);
    return operation.staged.emplace_back(tensor, comes_back, stream_.get()).bring(operation.task.doing);
  }

  // The group's stream goes on when the caller's has come to here.
  void follow_caller(const InFlight& operation) {
    const UniqueEvent ready = record_event(torch_->current_stream(), operation.task.doing);
    check_cuda(cudaStreamWaitEvent(stream_.get(), ready.get(), 0), operation.task.doing);
  }

  Work reduce_all(const std::string& operation, const at::Tensor& tensor, ReduceOp op, Milliseconds timeout) {
    Launch launch = begin(operation, timeout);
    void* data = launch.brings_back(tensor);
    return finish(launch, [&](ncclComm_t comm) {
      return ncclAllReduce(data, data, count(tensor), nccl_type(tensor.scalar_type()), nccl_op(op), comm,
                           stream_.get());
    });
  }

  Launch begin(const std::string& operation, Milliseconds timeout) {
    flush();
    const DeviceGuard guard(device_);
    auto call = describe_call(operation, timeout);
    follow_caller(*call);
    return Launch(*this, std::move(call));
  }

  Work finish(const Launch& launch, const std::function<ncclResult_t(ncclComm_t)>& enqueue) {
    const DeviceGuard guard(device_);
    send_off(launch.operation(), enqueue);
    return Work(std::make_unique<Operation>(*this, launch.operation()));
  }

  void send_off(const std::shared_ptr<InFlight>& operation, const std::function<ncclResult_t(ncclComm_t)>& enqueue) {
    comm_->run(operation->task, enqueue);
    try {
      operation->done = record_event(stream_.get(), operation->task.doing);
      operation->mark = passed_->mark(stream_.get(), operation->task.doing);
    } catch (const CollectiveError& error) {
      comm_->give_up(error.what(), error.exit_code());  // it runs, but nobody could know when it is done
      throw;
    }
    std::vector<std::shared_ptr<InFlight>> ended;  // freed by this thread, and without the lock
    {
      const std::lock_guard lock(watch_mutex_);
      in_flight_.push_back(operation);
      ended.swap(ended_);
    }
    watch_changed_.notify_one();
  }

  // Pieces between all pairs in one group call; this rank's own is copied.
  Work exchange(const std::string& doing, const at::Tensor& output, const at::Tensor& input,
                std::span<const int64_t> receive_counts, std::span<const int64_t> send_counts,
                std::span<const int64_t> send_offsets, Milliseconds timeout) {
    Launch launch = begin(doing, timeout);
    void* into = launch.brings_back(output);
    void* from = launch.brings(input);
    std::vector<int64_t> receive_offsets(size_, 0);
    std::partial_sum(receive_counts.begin(), receive_counts.end() - 1, receive_offsets.begin() + 1);
    void* own = address(into, output, receive_offsets[rank_]);
    const void* mine = address(from, input, send_offsets[rank_]);
    if (own != mine && send_counts[rank_] > 0) {
      const DeviceGuard guard(device_);
      check_cuda(cudaMemcpyAsync(own, mine, static_cast<size_t>(send_counts[rank_]) * input.element_size(),
                                 cudaMemcpyDeviceToDevice, stream_.get()),
                 doing);
    }
    const ncclDataType_t type = nccl_type(input.scalar_type());
    return finish(launch, [&](ncclComm_t comm) {
      GroupCall calls;
      for (int step = 1; step < size_; ++step) {  // each step every rank talks to another one
        const int to = (rank_ + step) % size_, source = (rank_ - step + size_) % size_;
        if (send_counts[to] > 0) {
          calls.add(ncclSend(address(from, input, send_offsets[to]), static_cast<size_t>(send_counts[to]), type, to,
                             comm, stream_.get()));
        }
        if (receive_counts[source] > 0) {
          calls.add(ncclRecv(address(into, output, receive_offsets[source]),
                             static_cast<size_t>(receive_counts[source]), type, source, comm, stream_.get()));
        }
      }
      return calls.end();
    });
  }

  Work transfer(bool is_send, const at::Tensor& tensor, int peer, const std::string& doing, Milliseconds timeout) {
    check_peer(peer);
    const DeviceGuard guard(device_);
    if (!batch_.operation) {
      batch_.operation = describe_call(doing, timeout);
    } else {
      comm_->check(batch_.operation->task);
      Task& task = batch_.operation->task;
      task.doing = where() + doing + ", with " + task.doing.substr(where().size());
      if (NcclCommunicator::Clock::now() + timeout < task.deadline) task = {task.doing, timeout};
    }
    follow_caller(*batch_.operation);
    void* data = place(*batch_.operation, tensor, !is_send);
    batch_.transfers.push_back({is_send, data, count(tensor), nccl_type(tensor.scalar_type()), peer});
    return Work(std::make_unique<Operation>(*this, batch_.operation));
  }

  void flush() {
    if (!batch_.operation) return;
    const Batch batch = std::exchange(batch_, {});
    const DeviceGuard guard(device_);
    send_off(batch.operation, [&](ncclComm_t comm) {
      GroupCall calls;
      for (const Transfer& transfer : batch.transfers) {
        calls.add(transfer.is_send
                      ? ncclSend(transfer.data, transfer.count, transfer.type, transfer.peer, comm, stream_.get())
                      : ncclRecv(transfer.data, transfer.count, transfer.type, transfer.peer, comm, stream_.get()));
      }
      return calls.end();
    });
  }

  // Ends the group when a peer is lost or the time is over; tells nobody, for the watcher asks too: no call of CUDA.
  Progress progress(const InFlight& operation) {
    if (comm_->is_lost()) return Progress::kLost;
    if (passed_->has_passed(operation.mark)) return Progress::kDone;
    comm_->is_settled(operation.task);
    if (NcclCommunicator::Clock::now() > operation.task.deadline) {
      comm_->give_up(
          operation.task.doing + " timed out after " + std::to_string(operation.task.timeout.count()) +
          " ms. Mend: look for the first ERROR of another rank; run again to go on from the last checkpoint");
    }
    return comm_->is_lost() ? Progress::kLost : Progress::kUnderWay;
  }

  // What the device says; then the group is ended.
  bool has_failed(const InFlight& operation) {
    const cudaError_t code = cudaEventQuery(operation.done.get());
    if (code == cudaSuccess || code == cudaErrorNotReady) return false;
    try {
      check_cuda(code, operation.task.doing);
    } catch (const CollectiveError& error) {
      comm_->give_up(error.what(), error.exit_code());
    }
    return true;
  }

  bool is_idle() {
    const std::lock_guard lock(watch_mutex_);
    set_aside_what_ended();
    ended_.clear();
    return std::none_of(in_flight_.begin(), in_flight_.end(),
                        [&](const auto& operation) { return !has_failed(*operation); });
  }

  // Not freed here: that calls CUDA.
  void set_aside_what_ended() {
    const auto ended = std::partition(in_flight_.begin(), in_flight_.end(), [&](const auto& operation) {
      return progress(*operation) == Progress::kUnderWay;
    });
    std::move(ended, in_flight_.end(), std::back_inserter(ended_));
    in_flight_.erase(ended, in_flight_.end());
  }

  void watch() {
    std::unique_lock lock(watch_mutex_);
    while (!is_stopping_) {
      if (in_flight_.empty()) {
        watch_changed_.wait(lock, [&] { return is_stopping_ || !in_flight_.empty(); });
      } else {
        watch_changed_.wait_for(lock, watch_interval_, [&] { return is_stopping_; });
        set_aside_what_ended();
      }
    }
  }

  void stop_watching() {
    {
      const std::lock_guard lock(watch_mutex_);
      is_stopping_ = true;
    }
    watch_changed_.notify_one();
    if (watcher_.joinable()) watcher_.join();
  }

  const std::shared_ptr<NcclCommunicator> comm_;
  const int rank_, size_, device_;
  const Milliseconds timeout_;
  const std::shared_ptr<const TorchDevice> torch_;
  const Milliseconds watch_interval_;
  std::optional<StreamProgress> passed_;
  UniqueStream stream_, fetches_;
  Batch batch_;
  int64_t sequence_ = 0;

  std::thread watcher_;
  std::mutex watch_mutex_;
  std::condition_variable watch_changed_;
  std::vector<std::shared_ptr<InFlight>> in_flight_, ended_;  // after the stream: their memory is given back to it
  bool is_stopping_ = false;
};

}  // namespace

std::unique_ptr<ProcessGroup> make_nccl_group(const NcclWorld& world, std::shared_ptr<const TorchDevice> torch,
                                              Milliseconds watch_interval) {
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess || version < NCCL_VERSION_CODE) {
    throw ConfigError("the NCCL library found is version " + std::to_string(version) + ", built for is " +
                      std::to_string(NCCL_VERSION_CODE) +
                      ". Mend: put the newer libnccl.so.2 first in LD_LIBRARY_PATH");
  }
  const DeviceGuard guard(world.device);
  auto comm = std::make_shared<NcclCommunicator>("world");
  Task task{"[rank " + std::to_string(world.rank) + "/" + std::to_string(world.world_size) + "] connecting group world",
            world.timeout};
  task.misuse = ExitCode::kConfig;  // two ranks on one GPU, most of all
  ncclUniqueId id{};
  if (world.rank == 0 && ncclGetUniqueId(&id) != ncclSuccess)
    throw CollectiveError(task.doing + " failed: no unique id: " + ncclGetLastError(nullptr));
  if (world.world_size > 1) world.share_id(std::as_writable_bytes(std::span(id.internal)));
  comm->connect(world.world_size, id, world.rank, task);
  return std::make_unique<NcclGroup>(std::move(comm), world, std::move(torch), watch_interval);
}

}  // namespace lockstep
