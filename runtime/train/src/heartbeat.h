#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>

#include <lockstep/base/fs.h>

namespace lockstep::train {

/// Shows starts on other hosts that this one lives (checkpoint/format/fencing.h). From a thread of its own, because a
/// step may take longer than they watch. Storage that fails costs a warning, not the run.
class Heartbeat {
 public:
  Heartbeat(Fs& fs, std::string run_dir, uint64_t epoch);

 private:
  void beat_until(const std::stop_token& stop);

  Fs& fs_;
  std::string run_dir_;
  uint64_t epoch_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::jthread thread_;  // last: it uses the others
};

}  // namespace lockstep::train
