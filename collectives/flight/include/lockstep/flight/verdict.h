#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <lockstep/flight/report.h>

namespace lockstep::flight {

enum class Cause : uint8_t {
  kNone,
  kNeverArrived,  ///< culprits are alive, or stopped, and in no collective while others wait for them
  kMismatch,      ///< ranks of a group called different things, or wait for each other in different groups
  kGone,          ///< a culprit's process ended before it was done
  kAllArrived,    ///< everybody is there: network or device; or a host that says nothing
};
const char* name_of(Cause cause);

/// How long is too long.
struct Rules {
  int64_t timeout_ns = 120'000'000'000;       ///< that a rank may keep others waiting while it trains
  int64_t long_timeout_ns = 240'000'000'000;  ///< while it evaluates or starts
  /// While it loads or saves: storage may be slow, and saves have a limit of their own (--save_timeout_s, 1,800).
  int64_t storage_timeout_ns = 2'100'000'000'000;
  int64_t silent_ns = 5'000'000'000;  ///< a node not heard of for so long is silent
};

/// What the ranks were started with; where they leave it open, 5 times the 99th percentile of a step but at least 30 s,
/// and 120 s until ten steps are timed.
Rules rules_for(std::span<const NodeReport> nodes);

struct Verdict {
  Cause cause = Cause::kNone;
  std::vector<int32_t> culprits;   ///< world ranks
  std::vector<std::string> hosts;  ///< of the culprits; or those that are silent
  std::string group;               ///< the call that is held up, empty: none
  CallReport call;
  std::vector<int32_t> waiting;  ///< ranks that wait in it
  int64_t waited_ns = 0;
  std::string message;  ///< one paragraph, culprit first
};

/// Looks at what all nodes know. Follows who waits for whom, through groups, to the rank that waits for nobody.
///
/// Mismatches and dead ranks are told at once; for the rest somebody must have waited for the timeout, and the culprit
/// must have done nothing for as long: ranks that are merely late, in whatever order, are no hang. Where reports are
/// missing (an agent that decides alone has its own node's), a culprit here goes before what is not known.
Verdict judge(std::span<const NodeReport> nodes, const Rules& rules);

/// The verdict as one JSON object, with the culprits' reports.
std::string verdict_json(const Verdict& verdict, std::span<const NodeReport> nodes);

/// A rank that computes more than `factor` times as long as the median of all, over its last 20 steps.
struct Straggler {
  int32_t rank = 0;
  std::string host;
  double ratio = 1;
  int64_t compute_ns = 0, median_ns = 0;  ///< of 20 steps
};
/// The slowest first; none while a rank has not done 20 steps.
std::vector<Straggler> find_stragglers(std::span<const NodeReport> nodes, double factor = 1.3);
/// What people read of them: the slowest with its times and the mend, the others by number. Not for none.
std::string describe(std::span<const Straggler> stragglers);

}  // namespace lockstep::flight
