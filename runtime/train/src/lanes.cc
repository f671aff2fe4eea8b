#include "lanes.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include <sched.h>
#include <unistd.h>

namespace lockstep::train {

// NOLINTNEXTLINE(bugprone-throw-keyword-missing): a vector of exception pointers, none thrown here
LanePool::LanePool(int num_lanes, const std::function<void()>& prepare) : errors_(num_lanes) {
  prepare();
  busy_ = num_lanes - 1;
  for (int lane = 1; lane < num_lanes; ++lane) threads_.emplace_back([this, lane, prepare] { work(lane, prepare); });
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return busy_ == 0; });
}

LanePool::~LanePool() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void LanePool::work(int lane, const std::function<void()>& prepare) {
  prepare();
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  --busy_;
  changed_.notify_all();
  for (;;) {
    changed_.wait(lock, [&] { return closing_ || round_ != seen; });
    if (closing_) return;
    seen = round_;
    lock.unlock();
    try {
      (*body_)(lane);
    } catch (...) {
      errors_[lane] = std::current_exception();
    }
    lock.lock();
    --busy_;
    changed_.notify_all();
  }
}

void LanePool::run(const std::function<void(int)>& body) {
  {
    const std::lock_guard lock(mutex_);
    body_ = &body;
    busy_ = static_cast<int>(threads_.size());
    ++round_;
  }
  changed_.notify_all();
  try {
    body(0);
  } catch (...) {
    errors_[0] = std::current_exception();
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return busy_ == 0; });
  for (auto& error : errors_) {
    if (auto first = std::exchange(error, nullptr)) {
      std::fill(errors_.begin(), errors_.end(), nullptr);
      std::rethrow_exception(first);
    }
  }
}

int spare_lanes(ProcessGroup& world, int threads_per_lane) {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  const std::string all = all_gather_bytes(world, std::as_bytes(std::span(host)));
  int neighbours = 0;
  for (int rank = 0; rank < world.size(); ++rank)
    neighbours += std::memcmp(all.data() + rank * host.size(), host.data(), host.size()) == 0;

  const int online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  cpu_set_t mask;
  CPU_ZERO(&mask);
  const int bound = sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : online;
  const int cores = bound < online ? bound : online / std::max(1, neighbours);
  return std::max(1, cores / threads_per_lane);
}

}  // namespace lockstep::train
