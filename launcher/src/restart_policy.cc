#include "restart_policy.h"

#include <algorithm>

#include <lockstep/base/error.h>

namespace lockstep::launcher {
namespace {

constexpr std::chrono::milliseconds kShortestDelay{1'000}, kLongestDelay{60'000};
constexpr double kJitter = 0.2;

// Whether another try may help at all.
bool may_pass(const Ending& ending) {
  switch (static_cast<ExitCode>(ending.exit_code)) {
    case ExitCode::kStorage:
    case ExitCode::kRunAgain:
    case ExitCode::kHang:
      return true;
    case ExitCode::kNodeBad:
      return ending.can_do_without_host;
    case ExitCode::kBug:
      return ending.cause == Cause::kCrashed;  // a check that failed fails again; a crash may have been the machine's
    default:
      return false;
  }
}

std::string at_step(const std::optional<int64_t>& step) { return step ? " at step " + std::to_string(*step) : ""; }

}  // namespace

Decision RestartPolicy::after(const Ending& ending) {
  Decision stop{false, ending.exit_code, {}, ""};
  if (ending.durable_step > state_.durable_step) {
    state_ = PolicyState{0, 0, ending.durable_step, {}};
  } else if (state_.restarts_used > 0 && ending.was_ready) {
    ++state_.cycles_without_progress;
  }
  if (ending.was_asked || restarts_ == 0 || !may_pass(ending)) return stop;
  // A code that invites scripts to run the job again would undo what is decided here.
  if (ending.exit_code != static_cast<int>(ExitCode::kBug)) stop.exit_code = static_cast<int>(ExitCode::kRestartsSpent);
  if (!ending.signature.empty()) {
    const PolicyState::Failure failure{ending.step, ending.signature};
    if (std::find(state_.seen.begin(), state_.seen.end(), failure) != state_.seen.end()) {
      stop.why = "the same failure came twice (" + ending.signature + at_step(ending.step) +
                 "), so it would come again. Mend: read the log of the rank it names; lower the memory it needs or "
                 "report the bug";
      return stop;
    }
    state_.seen.push_back(failure);
  }
  if (state_.cycles_without_progress >= kMostCyclesWithoutProgress) {
    stop.why = std::to_string(state_.cycles_without_progress) +
               " restarts trained and made no new checkpoint durable. Mend: save more often "
               "(--checkpoint_interval_steps), or find what ends the ranks";
    return stop;
  }
  if (state_.restarts_used >= restarts_) {
    stop.why = "all " + std::to_string(restarts_) +
               " restarts are spent since a checkpoint was last made durable. Mend: read the first failures above; "
               "--restarts allows more";
    return stop;
  }
  Decision go_on{true, 0, delay(ending), ""};
  ++state_.restarts_used;
  return go_on;
}

std::chrono::milliseconds RestartPolicy::delay(const Ending& ending) {
  const bool is_plain = ending.cause == Cause::kKilled || ending.cause == Cause::kLostHost;
  if (is_plain && state_.restarts_used == 0 && ending.signature.empty()) return std::chrono::milliseconds{0};
  const auto doublings = std::min<int64_t>(state_.restarts_used, 6);
  const auto whole = std::min(kShortestDelay * (int64_t{1} << doublings), kLongestDelay);
  const double factor = std::uniform_real_distribution<double>(1 - kJitter, 1 + kJitter)(random_);
  return std::chrono::milliseconds(static_cast<int64_t>(static_cast<double>(whole.count()) * factor));
}

}  // namespace lockstep::launcher
