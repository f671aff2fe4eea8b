#include "nccl_double.h"

#include <cstdlib>
#include <cstring>

namespace lockstep {
namespace {

char g_current_stream;  // its address is the handle
thread_local int g_device = 0;

std::string text(const void* pointer) { return pointer == nullptr ? "null" : NcclDouble::get().name_of(pointer); }

std::string type_name(ncclDataType_t type) {
  switch (type) {
    case ncclFloat32:
      return "f32";
    case ncclFloat64:
      return "f64";
    case ncclBfloat16:
      return "bf16";
    case ncclFloat16:
      return "f16";
    case ncclInt32:
      return "i32";
    case ncclInt64:
      return "i64";
    case ncclUint8:
      return "u8";
    default:
      return "other";
  }
}

std::string op_name(ncclRedOp_t op) {
  return op == ncclSum ? "sum" : op == ncclMax ? "max" : op == ncclMin ? "min" : "other";
}

ncclResult_t entry(const std::string& function, const std::string& arguments) {
  NcclDouble::get().record(function + "(" + arguments + ")");
  return NcclDouble::get().result_of(function);
}

cudaError_t cuda_entry(const std::string& function, const std::string& arguments) {
  NcclDouble::get().record(function + "(" + arguments + ")");
  return cudaSuccess;
}

}  // namespace

NcclDouble& NcclDouble::get() {
  static NcclDouble the_only_one;
  return the_only_one;
}

cudaStream_t NcclDouble::current_stream() { return reinterpret_cast<cudaStream_t>(&g_current_stream); }

void NcclDouble::reset() {
  const std::lock_guard lock(mutex_);
  version = NCCL_VERSION_CODE;
  polls_before_settled = 0;
  polls_left_.clear();
  never_settles = events_stay_pending = false;
  async_error = ncclSuccess;
  event_error = cudaSuccess;
  results.clear();
  rank = device = 0;
  size = 1;
  calls_.clear();
  counts_.clear();
  made_.clear();
  marks_.clear();
  std::erase_if(names_, [](const auto& named) { return !named.second.is_ours; });  // what leaked stays to be seen
  names_[&g_current_stream] = {"current", 1, false};
}

std::vector<std::string> NcclDouble::calls() {
  const std::lock_guard lock(mutex_);
  return calls_;
}

std::vector<std::string> NcclDouble::take() {
  const std::lock_guard lock(mutex_);
  return std::exchange(calls_, {});
}

std::vector<std::string> NcclDouble::take(const std::vector<std::string>& kinds) {
  std::vector<std::string> wanted;
  for (const std::string& call : take()) {
    for (const std::string& kind : kinds) {
      if (call.starts_with(kind)) {
        wanted.push_back(call);
        break;
      }
    }
  }
  return wanted;
}

int NcclDouble::count(const std::string& kind) {
  const std::lock_guard lock(mutex_);
  int count = 0;
  for (const auto& [function, times] : counts_) count += function.starts_with(kind) ? times : 0;
  return count;
}

void NcclDouble::set(const std::function<void(NcclDouble&)>& change) {
  const std::lock_guard lock(mutex_);
  change(*this);
  if (!events_stay_pending) pass();
}

void NcclDouble::mark(std::atomic<uint32_t>* memory, uint32_t value) {
  const std::lock_guard lock(mutex_);
  marks_.emplace_back(memory, value);
  if (!events_stay_pending) pass();
}

void NcclDouble::pass() {
  for (const auto& [memory, value] : marks_) {
    if (names_.contains(reinterpret_cast<const char*>(memory))) memory->store(value);
  }
  marks_.clear();
}

std::set<std::string> NcclDouble::live() {
  const std::lock_guard lock(mutex_);
  std::set<std::string> names;
  for (const auto& [handle, named] : names_) {
    if (named.is_ours) names.insert(named.name);
  }
  return names;
}

int NcclDouble::live_handles() { return static_cast<int>(live().size()); }

std::string NcclDouble::name_of(const void* pointer) {
  const std::lock_guard lock(mutex_);
  auto found = names_.upper_bound(static_cast<const char*>(pointer));
  if (found == names_.begin()) return "unknown";
  --found;
  const auto offset = static_cast<size_t>(static_cast<const char*>(pointer) - found->first);
  if (offset >= found->second.bytes) return "unknown";
  return found->second.name + (offset == 0 ? "" : "+" + std::to_string(offset) + " bytes");
}

void* NcclDouble::make(const std::string& kind, size_t bytes) {
  const std::lock_guard lock(mutex_);
  void* handle = std::malloc(bytes);
  names_[static_cast<char*>(handle)] = {kind + std::to_string(++made_[kind]), bytes, true};
  return handle;
}

void NcclDouble::call_it(const std::string& name, const void* begin, size_t bytes) {
  const std::lock_guard lock(mutex_);
  names_[static_cast<const char*>(begin)] = {name, bytes, false};
}

void NcclDouble::forget(const void* handle) {
  const std::lock_guard lock(mutex_);
  const auto found = names_.find(static_cast<const char*>(handle));
  if (found == names_.end() || !found->second.is_ours) return;
  names_.erase(found);
  std::free(const_cast<void*>(handle));
}

void NcclDouble::record(const std::string& call) {
  const std::lock_guard lock(mutex_);
  calls_.push_back(call);
  ++counts_[call.substr(0, call.find('('))];
  for (const auto& [handle, named] : names_) polls_left_[handle] = polls_before_settled;
}

ncclResult_t NcclDouble::result_of(const std::string& function) {
  const std::lock_guard lock(mutex_);
  const auto found = results.find(function);
  return found != results.end() ? found->second : polls_before_settled > 0 ? ncclInProgress : ncclSuccess;
}

ncclResult_t NcclDouble::async_state(const void* comm) {
  const std::lock_guard lock(mutex_);
  ++counts_["ncclCommGetAsyncError"];
  if (async_error != ncclSuccess) return async_error;
  if (never_settles) return ncclInProgress;
  int& left = polls_left_[static_cast<const char*>(comm)];
  if (left == 0) return ncclSuccess;
  --left;
  return ncclInProgress;
}

bool NcclDouble::is_ready(const void* comm) {
  const std::lock_guard lock(mutex_);
  return polls_left_[static_cast<const char*>(comm)] == 0;
}

cudaError_t NcclDouble::event_state() {
  const std::lock_guard lock(mutex_);
  ++counts_["cudaEventQuery"];
  return event_error != cudaSuccess ? event_error : events_stay_pending ? cudaErrorNotReady : cudaSuccess;
}

}  // namespace lockstep

// The entry points, as nccl.h and cuda_runtime_api.h declare them.
using lockstep::cuda_entry;
using lockstep::entry;
using lockstep::NcclDouble;
using lockstep::op_name;
using lockstep::text;
using lockstep::type_name;

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = NcclDouble::get().version;
  return ncclSuccess;
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::memset(id->internal, 'i', sizeof(id->internal));
  return entry("ncclGetUniqueId", "");
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
  *comm = static_cast<ncclComm_t>(NcclDouble::get().make("comm"));
  return entry("ncclCommInitRankConfig", std::to_string(rank) + " of " + std::to_string(size) + ", id " +
                                             std::string(id.internal, 2) + ", blocking " +
                                             std::to_string(config->blocking) + ", " + config->commName);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* part, ncclConfig_t* config) {
  *part = static_cast<ncclComm_t>(NcclDouble::get().make("comm"));
  return entry("ncclCommSplit", text(comm) + ", color " + std::to_string(color) + ", key " + std::to_string(key) +
                                    ", blocking " + std::to_string(config->blocking) + ", " + config->commName);
}
ncclResult_t ncclCommFinalize(ncclComm_t comm) { return entry("ncclCommFinalize", text(comm)); }
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  const ncclResult_t result = entry("ncclCommDestroy", text(comm));
  NcclDouble::get().forget(comm);
  return result;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const ncclResult_t result = entry("ncclCommAbort", text(comm));
  NcclDouble::get().forget(comm);
  return result;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  if (NcclDouble::get().name_of(comm) == "unknown") return ncclInvalidArgument;
  *state = NcclDouble::get().async_state(comm);
  return ncclSuccess;
}
ncclResult_t ncclCommCount(ncclComm_t comm, int* size) {
  if (!NcclDouble::get().is_ready(comm)) return ncclInvalidArgument;
  *size = NcclDouble::get().size;
  return ncclSuccess;
}
ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) {
  if (!NcclDouble::get().is_ready(comm)) return ncclInvalidArgument;
  *rank = NcclDouble::get().rank;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t code) {
  return code == ncclRemoteError ? "remote process exited" : code == ncclInvalidUsage ? "invalid usage" : "other error";
}
const char* ncclGetLastError(ncclComm_t) { return "connection closed by peer"; }
ncclResult_t ncclGroupStart() { return entry("ncclGroupStart", ""); }
ncclResult_t ncclGroupEnd() { return entry("ncclGroupEnd", ""); }

ncclResult_t ncclAllReduce(const void* from, void* into, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  return entry("ncclAllReduce", text(from) + " to " + text(into) + ", " + std::to_string(count) + " " +
                                    type_name(type) + " " + op_name(op) + ", " + text(comm) + ", " + text(stream));
}
ncclResult_t ncclReduceScatter(const void* from, void* into, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  return entry("ncclReduceScatter", text(from) + " to " + text(into) + ", " + std::to_string(count) + " " +
                                        type_name(type) + " " + op_name(op) + ", " + text(comm) + ", " + text(stream));
}
ncclResult_t ncclAllGather(const void* from, void* into, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  return entry("ncclAllGather", text(from) + " to " + text(into) + ", " + std::to_string(count) + " " +
                                    type_name(type) + ", " + text(comm) + ", " + text(stream));
}
ncclResult_t ncclBroadcast(const void* from, void* into, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  return entry("ncclBroadcast", text(from) + " to " + text(into) + ", " + std::to_string(count) + " " +
                                    type_name(type) + ", root " + std::to_string(root) + ", " + text(comm) + ", " +
                                    text(stream));
}
ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return entry("ncclSend", text(from) + ", " + std::to_string(count) + " " + type_name(type) + ", to " +
                               std::to_string(peer) + ", " + text(comm) + ", " + text(stream));
}
ncclResult_t ncclRecv(void* into, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return entry("ncclRecv", text(into) + ", " + std::to_string(count) + " " + type_name(type) + ", from " +
                               std::to_string(peer) + ", " + text(comm) + ", " + text(stream));
}

cudaError_t cudaGetDevice(int* device) {
  *device = lockstep::g_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  lockstep::g_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = static_cast<cudaStream_t>(NcclDouble::get().make("stream"));
  return cuda_entry("cudaStreamCreateWithPriority", std::to_string(flags) + ", " + std::to_string(priority) +
                                                        ", device " + std::to_string(lockstep::g_device));
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const cudaError_t result = cuda_entry("cudaStreamDestroy", text(stream));
  NcclDouble::get().forget(stream);
  return result;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cuda_entry("cudaStreamSynchronize", text(stream)); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return cuda_entry("cudaStreamWaitEvent", text(stream) + ", " + text(event));
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = static_cast<cudaEvent_t>(NcclDouble::get().make("event"));
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (lockstep::g_device != NcclDouble::get().device) return cudaErrorInvalidDevice;
  return cuda_entry("cudaEventRecord", text(event) + ", " + text(stream));
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (NcclDouble::get().name_of(event) == "unknown") return cudaErrorInvalidResourceHandle;
  return NcclDouble::get().event_state();
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  NcclDouble::get().forget(event);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) {
  *pointer = NcclDouble::get().make("memory", bytes);
  return cuda_entry("cudaMallocAsync", std::to_string(bytes) + ", " + text(stream));
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  const cudaError_t result = cuda_entry("cudaFreeAsync", text(pointer) + ", " + text(stream));
  NcclDouble::get().forget(pointer);
  return result;
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = NcclDouble::get().make("host", bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* pointer) {
  NcclDouble::get().forget(pointer);
  return cudaSuccess;
}
int write_value(cudaStream_t, unsigned long long address, uint32_t value, unsigned) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's call takes an address as a number
  NcclDouble::get().mark(reinterpret_cast<std::atomic<uint32_t>*>(address), value);
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(&write_value);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  std::memmove(to, from, bytes);
  const char* way = kind == cudaMemcpyHostToDevice ? "in" : kind == cudaMemcpyDeviceToHost ? "out" : "within";
  return cuda_entry("cudaMemcpyAsync",
                    text(from) + " to " + text(to) + ", " + std::to_string(bytes) + " " + way + ", " + text(stream));
}
const char* cudaGetErrorName(cudaError_t code) {
  return code == cudaErrorECCUncorrectable ? "cudaErrorECCUncorrectable" : "cudaErrorOther";
}
const char* cudaGetErrorString(cudaError_t) { return "as the double was told"; }

}  // extern "C"
