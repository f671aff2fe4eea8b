#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <lockstep/collectives/process_group.h>

namespace lockstep::train {

/// Threads that run micro-batches side by side. Lane 0 is the caller's thread.
class LanePool {
 public:
  /// @param prepare runs once on every lane's thread, before anything else.
  LanePool(int num_lanes, const std::function<void()>& prepare);
  ~LanePool();
  LanePool(const LanePool&) = delete;
  LanePool& operator=(const LanePool&) = delete;

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  /// Runs `body(lane)` on every lane and waits for all. Rethrows the first exception, lane 0's before others.
  void run(const std::function<void(int)>& body);

 private:
  void work(int lane, const std::function<void()>& prepare);

  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(int)>* body_ = nullptr;
  uint64_t round_ = 0;
  int busy_ = 0;
  bool closing_ = false;
  std::vector<std::exception_ptr> errors_;
  std::vector<std::thread> threads_;
};

/// How many micro-batches this rank may run at once: cores it has (its binding, else an even share of the node's) over
/// threads. Collective over `world`: ranks of one node are counted.
int spare_lanes(ProcessGroup& world, int threads_per_lane);

}  // namespace lockstep::train
