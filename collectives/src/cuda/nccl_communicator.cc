#include "nccl_communicator.h"

#include <thread>
#include <utility>

#include <sched.h>

namespace lockstep {
namespace {

constexpr int kSpinsBeforeSleep = 256;  // NCCL mostly takes work over within microseconds
constexpr std::chrono::microseconds kNap{50};

bool is_node_bad(cudaError_t code) {
  return code == cudaErrorECCUncorrectable || code == cudaErrorNvlinkUncorrectable ||
         code == cudaErrorHardwareStackError || code == cudaErrorDevicesUnavailable;
}

ExitCode exit_code_of(ncclResult_t code, ExitCode misuse) {
  return code == ncclInvalidArgument || code == ncclInvalidUsage ? misuse : ExitCode::kRunAgain;
}

}  // namespace

void check_cuda(cudaError_t code, const std::string& doing, const char* file, int line) {
  if (code == cudaSuccess) return;
  const std::string text = doing + " failed: " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code) + " (" +
                           file + ":" + std::to_string(line) + ")";
  if (is_node_bad(code)) {
    throw CollectiveError(text + ". Mend: take this node out of the job", ExitCode::kNodeBad);
  }
  throw CollectiveError(text);
}

NcclCommunicator::~NcclCommunicator() {
  if (comm_ != nullptr) ncclCommAbort(comm_);
}

ncclConfig_t NcclCommunicator::config_named(const std::string& name) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.commName = name.c_str();
  return config;
}

void NcclCommunicator::connect(int world_size, const ncclUniqueId& id, int rank, const Task& task) {
  ncclConfig_t config = config_named(name_);
  run(task, [&](ncclComm_t) { return ncclCommInitRankConfig(&comm_, world_size, id, rank, &config); });
}

std::shared_ptr<NcclCommunicator> NcclCommunicator::split(int color, int key, const std::string& name,
                                                          const Task& task) {
  auto child = std::make_shared<NcclCommunicator>(name);
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(children_, [](const auto& known) { return known.expired(); });
    children_.push_back(child);
  }
  ncclConfig_t config = config_named(child->name_);
  // NCCL writes the child's handle by the time the parent has settled, hence its home in the child from the start.
  run(task, [&](ncclComm_t comm) { return ncclCommSplit(comm, color, key, &child->comm_, &config); });
  child->settle(task);
  return child;
}

int NcclCommunicator::rank(const Task& task) {
  int rank = 0;
  run(task, [&](ncclComm_t comm) { return ncclCommUserRank(comm, &rank); });
  return rank;
}

int NcclCommunicator::size(const Task& task) {
  int size = 0;
  run(task, [&](ncclComm_t comm) { return ncclCommCount(comm, &size); });
  return size;
}

std::string NcclCommunicator::words_for(ncclResult_t code) {
  std::string words = ncclGetErrorString(code);
  const char* more = comm_ == nullptr ? nullptr : ncclGetLastError(comm_);
  if (more != nullptr && *more != '\0') words += std::string(": ") + more;
  return words;
}

void NcclCommunicator::run(const Task& task, const std::function<ncclResult_t(ncclComm_t)>& call) {
  check(task);
  std::string trouble;
  ncclResult_t code = ncclSuccess;
  {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) code = call(comm_);
    if (code != ncclSuccess && code != ncclInProgress) trouble = words_for(code);
  }
  if (!trouble.empty()) give_up(task.doing + " failed: " + trouble, exit_code_of(code, task.misuse));
  settle(task);
}

void NcclCommunicator::settle(const Task& task) {
  for (int spins = 0; !is_settled(task); ++spins) {
    check(task);
    if (Clock::now() > task.deadline) {
      give_up(task.doing + " timed out after " + std::to_string(task.timeout.count()) +
              " ms: not all ranks came to it. Mend: look for the first ERROR of another rank; run again to go on from "
              "the last checkpoint");
    }
    if (spins < kSpinsBeforeSleep) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }
}

bool NcclCommunicator::is_settled(const Task& task) noexcept {
  std::string trouble;
  ncclResult_t state = ncclSuccess;
  {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) return false;
    const ncclResult_t code = ncclCommGetAsyncError(comm_, &state);
    if (code != ncclSuccess) state = code;
    if (state == ncclSuccess) return true;
    if (state == ncclInProgress) return false;
    trouble = words_for(state);
  }
  give_up(task.doing + " failed: " + trouble, exit_code_of(state, task.misuse));
  return false;
}

bool NcclCommunicator::is_lost() {
  const std::lock_guard lock(mutex_);
  return !failure_.empty();
}

void NcclCommunicator::check(const Task& task) {
  const std::lock_guard lock(mutex_);
  if (failure_.empty()) return;
  is_told_ = true;
  if (failure_.starts_with(task.doing)) throw CollectiveError(failure_, failure_code_);
  throw CollectiveError(task.doing + " failed, group " + name_ + " is unusable: " + failure_, failure_code_);
}

void NcclCommunicator::give_up(const std::string& reason, ExitCode code) noexcept {
  std::vector<std::weak_ptr<NcclCommunicator>> children;
  {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) return;
    failure_ = reason;
    failure_code_ = code;
    if (comm_ != nullptr) ncclCommAbort(std::exchange(comm_, nullptr));
    children.swap(children_);
  }
  for (const auto& child : children) {
    if (const auto alive = child.lock()) alive->give_up(reason, code);
  }
}

void NcclCommunicator::abort() noexcept {
  give_up("it was aborted");
  const std::lock_guard lock(mutex_);
  is_told_ = true;
}

void NcclCommunicator::close(const Task& task) {
  {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) {
      if (std::exchange(is_told_, true)) return;
      throw CollectiveError(task.doing + " found that group " + name_ + " failed before: " + failure_, failure_code_);
    }
    if (comm_ == nullptr) return;
  }
  run(task, [](ncclComm_t comm) { return ncclCommFinalize(comm); });
  const std::lock_guard lock(mutex_);
  if (comm_ != nullptr) ncclCommDestroy(std::exchange(comm_, nullptr));
}

}  // namespace lockstep
