#include <algorithm>
#include <cmath>
#include <numbers>

#include <lockstep/base/error.h>
#include <lockstep/optim/schedule.h>

namespace lockstep::optim {

double learning_rate_at(const ScheduleOptions& options, int64_t any_step) {
  const auto& [kind, peak, final_fraction, warmup, total, decay_fraction] = options;
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
  const auto down = [&](double share) { return peak * (1 - (1 - final_fraction) * share); };
  if (kind == "constant") return peak;
  if (kind == "linear") return down(progress_since(warmup));
  if (kind == "cosine") return down(0.5 * (1 - std::cos(std::numbers::pi * progress_since(warmup))));
  const auto decay_start = total - static_cast<int64_t>(std::llround(decay_fraction * static_cast<double>(total)));
  return step < decay_start ? peak : down(progress_since(decay_start));
}

}  // namespace lockstep::optim
