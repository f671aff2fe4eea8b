#pragma once

#include <cstdint>
#include <string>

namespace lockstep::optim {

struct ScheduleOptions {
  std::string kind = "cosine";  ///< constant | cosine | linear | wsd
  double learning_rate = 1e-3;  ///< peak
  double final_fraction = 0.1;  ///< last step's rate as a fraction of the peak
  int64_t warmup_steps = 0;     ///< linear from 0: step s of the warm-up has (s + 1) / warmup_steps of the peak
  int64_t total_steps = 1;
  double decay_fraction = 0.2;  ///< wsd: the share of total_steps that decays, linearly, at the end
};

/// The rate of 0-based `step`: a pure function, nothing to save. Past the end: the last step's rate. Source for wsd: Hu
/// et al., MiniCPM, arXiv:2404.06395.
/// @throws ConfigError unknown kind, warm-up longer than the run; at any step, so one call checks the options.
double learning_rate_at(const ScheduleOptions& options, int64_t step);

}  // namespace lockstep::optim
