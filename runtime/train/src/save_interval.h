#pragma once

#include <chrono>
#include <cstdint>

#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/train/options.h>

namespace lockstep::train {

/// Seconds between the ends of saves that lose least: sqrt(2 x cost x mean time between failures), where `stall_s` is
/// what a save holds training up and `storage_s` how long storage is at work for it. At least 10 x storage_s, so that
/// storage is free for others, and at most 10 minutes.
/// Source: Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; Daly, FGCS 22(3),
/// 2006.
double seconds_between_saves(double stall_s, double storage_s, double mean_time_between_failures_s);

/// When a run saves: after a number of steps, the same on every rank, or by a rank's clock and what saves have cost it
/// so far; then that rank tells the others.
class SaveInterval {
 public:
  using Clock = std::chrono::steady_clock;

  SaveInterval(int64_t steps, double mean_time_between_failures_s);

  bool saves_between() const { return steps_ != 0; }  ///< else only the end
  bool is_due_after(int64_t step) const { return steps_ > 0 && step % steps_ == 0; }
  bool is_due_by_clock(Clock::time_point now = Clock::now()) const;
  void saved(const checkpoint::SaveResult& result, Clock::time_point now = Clock::now());

 private:
  int64_t steps_;  // < 0: by the clock
  double mtbf_s_;
  double wait_s_;
  Clock::time_point last_ = Clock::now();
};

}  // namespace lockstep::train
