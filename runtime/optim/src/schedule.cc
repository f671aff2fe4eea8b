#include <algorithm>
#include <cmath>
#include <numbers>

#include <lockstep/base/error.h>
#include <lockstep/optim/schedule.h>

namespace lockstep::optim {

double learning_rate_at(const ScheduleOptions& options, int64_t any_step) {
  const std::string& kind = options.kind;
  const double peak = options.learning_rate;
  const int64_t warmup = options.warmup_steps, total = options.total_steps;
  if (kind != "constant" && kind != "cosine" && kind != "linear" && kind != "wsd")
    throw ConfigError("--learning_rate_schedule=" + kind + " is neither constant, cosine, linear nor wsd");
  if (warmup < 0 || warmup > total) {
    throw ConfigError("--warmup_steps=" + std::to_string(warmup) +
                      " does not fit into --steps=" + std::to_string(total));
  }
  const int64_t step = std::min(any_step, total - 1);
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  // From 0 after the warm-up to 1 at the last step.
  const auto progress_since = [&](int64_t start) {
    return total - 1 <= start ? 1.0 : static_cast<double>(step - start) / static_cast<double>(total - 1 - start);
  };
  const auto down = [&](double share) { return peak * (1 - (1 - options.final_fraction) * share); };
  if (kind == "constant") return peak;
  if (kind == "linear") return down(progress_since(warmup));
  if (kind == "cosine") return down(0.5 * (1 - std::cos(std::numbers::pi * progress_since(warmup))));
  const auto decay_steps = static_cast<int64_t>(std::llround(options.decay_fraction * static_cast<double>(total)));
  const int64_t decay_start = total - decay_steps;
  return step < decay_start ? peak : down(progress_since(decay_start));
}

}  // namespace lockstep::optim
