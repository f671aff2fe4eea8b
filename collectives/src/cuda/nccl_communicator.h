#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {

struct StreamTraits {
  using Handle = cudaStream_t;
  static Handle null() noexcept { return nullptr; }
  static void close(Handle stream) noexcept { cudaStreamDestroy(stream); }
};
using UniqueStream = UniqueHandle<StreamTraits>;

struct EventTraits {
  using Handle = cudaEvent_t;
  static Handle null() noexcept { return nullptr; }
  static void close(Handle event) noexcept { cudaEventDestroy(event); }  // one not reached yet is freed when it is
};
using UniqueEvent = UniqueHandle<EventTraits>;

/// @throws CollectiveError with CUDA's own words; its exit code says so when it is the node that is bad.
void check_cuda(cudaError_t code, const std::string& doing, const char* file = __builtin_FILE(),
                int line = __builtin_LINE());

/// An NCCL communicator that can be given up from any thread, and remembers why it was.
///
/// Non-blocking: no NCCL call waits for a peer. settle() is what waits, with a deadline, and abort() ends that too.
/// Threads: all members may be called at once; the lock is held for single NCCL calls only, never for a wait.
class NcclCommunicator {
 public:
  using Clock = std::chrono::steady_clock;

  /// One bounded piece of work, in words for messages.
  struct Task {
    std::string doing;
    std::chrono::milliseconds timeout{0};
    Clock::time_point deadline = Clock::now() + timeout;
    ExitCode misuse = ExitCode::kBug;  ///< what it means that NCCL calls this invalid
  };

  explicit NcclCommunicator(std::string name) : name_(std::move(name)) {}
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;
  ~NcclCommunicator();  // waits for no peer: what is still open is aborted

  const std::string& name() const { return name_; }

  void connect(int world_size, const ncclUniqueId& id, int rank, const Task& task);
  std::shared_ptr<NcclCommunicator> split(int color, int key, const std::string& name, const Task& task);
  int rank(const Task& task);
  int size(const Task& task);

  /// Runs `call` on the communicator and waits until NCCL took its work over: kernels are then in their streams.
  void run(const Task& task, const std::function<ncclResult_t(ncclComm_t)>& call);
  /// Frees the communicator with the others. Collective; after a failure only throws that, if nobody was told yet.
  void close(const Task& task);

  /// Throws the failure there is, in words that name `task`.
  void check(const Task& task);
  bool is_lost();
  /// Asks NCCL's background threads; what they report ends the communicator. @return true when nothing is under way.
  bool is_settled(const Task& task) noexcept;
  /// Ends it with `reason`, once; the first reason stays. Its splits go with it.
  void give_up(const std::string& reason, ExitCode code = ExitCode::kRunAgain) noexcept;
  /// As give_up(), by the owner, whom close() need not tell.
  void abort() noexcept;

 private:
  void settle(const Task& task);
  std::string words_for(ncclResult_t code);  // the lock is held
  static ncclConfig_t config_named(const std::string& name);

  const std::string name_;
  std::mutex mutex_;
  ncclComm_t comm_ = nullptr;
  std::string failure_;
  ExitCode failure_code_ = ExitCode::kRunAgain;
  bool is_told_ = false;
  std::vector<std::weak_ptr<NcclCommunicator>> children_;
};

}  // namespace lockstep
