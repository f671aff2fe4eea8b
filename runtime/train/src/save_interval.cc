#include "save_interval.h"

#include <algorithm>
#include <cmath>

namespace lockstep::train {

double seconds_between_saves(double stall_s, double storage_s, double mean_time_between_failures_s) {
  return std::min(600.0, std::max(10 * storage_s, std::sqrt(2 * stall_s * mean_time_between_failures_s)));
}

// Until the first has told what one costs: as if it were a second, and a minute at most.
SaveInterval::SaveInterval(int64_t steps, double mean_time_between_failures_s)
    : steps_(steps),
      mtbf_s_(mean_time_between_failures_s),
      wait_s_(std::min(60.0, seconds_between_saves(1, 0, mtbf_s_))) {}

bool SaveInterval::is_due_by_clock(Clock::time_point now) const {
  return steps_ < 0 && std::chrono::duration<double>(now - last_).count() >= wait_s_;
}

// One that failed is tried again after the same time.
void SaveInterval::saved(const checkpoint::SaveResult& result, Clock::time_point now) {
  last_ = now;
  if (result.durable) wait_s_ = seconds_between_saves(result.stall_seconds, result.storage_seconds, mtbf_s_);
}

}  // namespace lockstep::train
