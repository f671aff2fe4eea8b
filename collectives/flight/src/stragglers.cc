#include <algorithm>
#include <array>
#include <cstdio>

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
  std::stable_sort(stragglers.begin(), stragglers.end(),
                   [](const Straggler& a, const Straggler& b) { return a.compute_ns > b.compute_ns; });
  return stragglers;
}

std::string describe(std::span<const Straggler> stragglers) {
  constexpr size_t kMostNamed = 8;  // a slow host may have dozens
  const Straggler& slowest = stragglers.front();
  const auto ms_a_step = [](int64_t ns) { return static_cast<double>(ns) / (1e6 * kStragglerSteps); };
  std::array<char, 320> text{};
  std::snprintf(
      text.data(), text.size(),
      "straggler: rank %d (host %.64s) computes %.2f times as long as the median rank: %.1f ms a step against "
      "%.1f ms, over %zu steps",
      slowest.rank, slowest.host.c_str(), slowest.ratio, ms_a_step(slowest.compute_ns), ms_a_step(slowest.median_ns),
      kStragglerSteps);
  std::string message = text.data();
  for (size_t i = 1; i < std::min(stragglers.size(), kMostNamed); ++i)
    message += (i == 1 ? "; too slow too: rank " : ", ") + std::to_string(stragglers[i].rank) + " (host " +
               stragglers[i].host + ")";
  if (stragglers.size() > kMostNamed) message += " and " + std::to_string(stragglers.size() - kMostNamed) + " more";
  return message + ". Mend: look for other work on its cores, heat, or an uneven share";
}

}  // namespace lockstep::flight
