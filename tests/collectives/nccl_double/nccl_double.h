#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>
#include <nccl.h>

namespace lockstep {

/// Stands in for libnccl and libcudart at link time: one rank's view of them. Records every call as text, and answers
/// as told. Nothing is computed and no data moves, except by cudaMemcpyAsync.
///
/// Handles read "comm1", "stream1", "event1", in the order they were made; the caller's own stream is "current".
/// Threads: all calls may come at once. Polls (ncclCommGetAsyncError, cudaEventQuery) are counted, not recorded.
class NcclDouble {
 public:
  static NcclDouble& get();
  void reset();  ///< back to a world where all goes well, nothing recorded

  std::vector<std::string> calls();                                      ///< since the last take()
  std::vector<std::string> take();                                       ///< calls(), which then starts anew
  std::vector<std::string> take(const std::vector<std::string>& kinds);  ///< those that begin with one of `kinds`
  int count(const std::string& kind);  ///< of all calls since reset() that begin with `kind`

  // What to answer. Set before the calls are made.
  int version = NCCL_VERSION_CODE;
  int polls_before_settled = 0;                 ///< asks that see ncclInProgress after each call
  bool never_settles = false;                   ///< as with a peer that does not come
  ncclResult_t async_error = ncclSuccess;       ///< what NCCL's background threads found
  std::map<std::string, ncclResult_t> results;  ///< by function name
  bool events_stay_pending = false;             ///< kernels do not end
  cudaError_t event_error = cudaSuccess;        ///< what cudaEventQuery finds
  int rank = 0, size = 1;                       ///< of the communicators asked
  int device = 0;                               ///< where events may be recorded

  /// Memory of the test's, so that pointers into it read "input", "input+8 bytes".
  void call_it(const std::string& name, const void* begin, size_t bytes);

  // Locked access while other threads run.
  void set(const std::function<void(NcclDouble&)>& change);
  int live_handles();  ///< communicators, streams, events and device memory not given back
  std::set<std::string> live();

  static cudaStream_t current_stream();

  // For the entry points.
  std::string name_of(const void* handle);
  void* make(const std::string& kind, size_t bytes = 1);
  void forget(const void* handle);
  void record(const std::string& call);
  ncclResult_t result_of(const std::string& function);
  ncclResult_t async_state(const void* comm);
  bool is_ready(const void* comm);
  cudaError_t event_state();
  void mark(std::atomic<uint32_t>* memory, uint32_t value);  ///< written when kernels end

 private:
  std::recursive_mutex mutex_;
  std::vector<std::string> calls_;
  std::map<std::string, int> counts_, made_;
  struct Named {
    std::string name;
    size_t bytes;
    bool is_ours;
  };
  std::map<const char*, Named> names_;
  std::map<const char*, int> polls_left_;  // by communicator
  std::vector<std::pair<std::atomic<uint32_t>*, uint32_t>> marks_;

  void pass();
};

}  // namespace lockstep
