#include "heartbeat.h"

#include <chrono>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/checkpoint/checkpoint.h>

namespace lockstep::train {
namespace {

constexpr std::chrono::seconds kInterval{5};

}  // namespace

Heartbeat::Heartbeat(Fs& fs, std::string run_dir, uint64_t epoch)
    : fs_(fs),
      run_dir_(std::move(run_dir)),
      epoch_(epoch),
      thread_([this](const std::stop_token& stop) { beat_until(stop); }) {}

void Heartbeat::beat_until(const std::stop_token& stop) {
  bool warned = false;
  for (uint64_t count = 1; !stop.stop_requested(); ++count) {
    try {
      checkpoint::beat(fs_, run_dir_, epoch_, count);
    } catch (const Error& error) {
      LOG_IF(WARNING, !warned) << "no heartbeat: " << error.what();
      warned = true;
    }
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, stop, kInterval, [] { return false; });  // woken by the stop alone
  }
}

}  // namespace lockstep::train
