#include <algorithm>

#include <lockstep/flight/verdict.h>

#include "rules.h"

namespace lockstep::flight {

std::vector<Straggler> find_stragglers(std::span<const NodeReport> nodes, double factor) {
  constexpr int64_t kLeastExcessNs = 100'000'000;  // 5 ms a step: below, the scheduler's moods are all there is to see
  std::vector<int64_t> times;
  for (const NodeReport& node : nodes) {
    for (const RankReport& rank : node.ranks) {
      if (rank.timed_steps < static_cast<int64_t>(kStragglerSteps)) return {};
      times.push_back(rank.compute_ns);
    }
  }
  if (times.size() < 2) return {};
  const auto middle = times.begin() + static_cast<std::ptrdiff_t>((times.size() - 1) / 2);  // of two the faster
  std::nth_element(times.begin(), middle, times.end());
  std::vector<Straggler> stragglers;
  for (const NodeReport& node : nodes) {
    for (const RankReport& rank : node.ranks) {
      const double ratio = static_cast<double>(rank.compute_ns) / static_cast<double>(std::max<int64_t>(*middle, 1));
      if (ratio > factor && rank.compute_ns - *middle > kLeastExcessNs)
        stragglers.push_back({rank.rank, node.host, ratio, rank.compute_ns, *middle});
    }
  }
  return stragglers;
}

}  // namespace lockstep::flight
