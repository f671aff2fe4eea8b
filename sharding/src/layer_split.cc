#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>

#include <lockstep/base/error.h>
#include <lockstep/sharding/layer_split.h>

namespace lockstep {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

std::string text_of(const LayerSplit& split) {
  std::string text;
  for (const int64_t count : split) text += (text.empty() ? "" : ",") + std::to_string(count);
  return text;
}

// Sums of layers [begin, end) as differences of running sums: the same expression everywhere, so that a limit found
// with it can be kept with it.
class Costs {
 public:
  explicit Costs(std::span<const double> costs) : running_(costs.size() + 1, 0.0) {
    std::partial_sum(costs.begin(), costs.end(), running_.begin() + 1);
  }
  size_t num_layers() const { return running_.size() - 1; }
  double of(size_t begin, size_t end) const { return running_[end] - running_[begin]; }

 private:
  std::vector<double> running_;
};

// best[k][i]: of the ways to cut layers i .. into k parts, the least `combine` over their costs. Non-empty parts.
template <typename Combine>
std::vector<std::vector<double>> best_of_tails(const Costs& costs, int num_parts, Combine combine) {
  const size_t n = costs.num_layers();
  std::vector<std::vector<double>> best(num_parts + 1, std::vector<double>(n + 1, kNever));
  best[0][n] = 0;
  for (int k = 1; k <= num_parts; ++k) {
    for (size_t begin = 0; begin < n; ++begin) {
      for (size_t end = begin + 1; end <= n; ++end)
        best[k][begin] = std::min(best[k][begin], combine(costs.of(begin, end), best[k - 1][end]));
    }
  }
  return best;
}

}  // namespace

LayerRange layers_of_part(const LayerSplit& split, int part) {
  const int64_t begin = std::accumulate(split.begin(), split.begin() + part, int64_t{0});
  return {begin, begin + split[part]};
}

LayerSplit split_layers(std::span<const double> costs, int num_parts) {
  LOCKSTEP_CHECK(num_parts > 0) << "layers cannot be split into " << num_parts << " parts";
  for (const double cost : costs) LOCKSTEP_CHECK(cost >= 0 && std::isfinite(cost)) << "a layer cannot cost " << cost;
  if (costs.size() < static_cast<size_t>(num_parts)) {
    LayerSplit explicit_split(num_parts, 0);
    std::fill_n(explicit_split.begin(), costs.size(), 1);
    throw ConfigError("a pipeline of " + std::to_string(num_parts) + " parts (stages x chunks) does not fit " +
                      std::to_string(costs.size()) + " layers. Mend: fewer stages or chunks, or say which parts are " +
                      "empty: " + text_of(explicit_split));
  }
  const Costs sums(costs);
  const double limit =
      best_of_tails(sums, num_parts, [](double part, double rest) { return std::max(part, rest); })[num_parts][0];
  const auto squares = [limit](double part, double rest) { return part > limit ? kNever : part * part + rest; };
  const auto best = best_of_tails(sums, num_parts, squares);
  LayerSplit split;
  size_t begin = 0;
  for (int k = num_parts; k > 0; --k) {
    size_t end = begin + 1;
    while (squares(sums.of(begin, end), best[k - 1][end]) != best[k][begin]) ++end;
    split.push_back(static_cast<int64_t>(end - begin));
    begin = end;
  }
  return split;
}

LayerSplit parse_layer_split(const std::string& text, int64_t num_layers, int num_parts) {
  const auto refuse = [&](const std::string& why) {
    LayerSplit even;
    for (int part = 0; part < num_parts; ++part)
      even.push_back((num_layers * (part + 1)) / num_parts - (num_layers * part) / num_parts);
    throw ConfigError("layer split '" + text + "' " + why + ". Mend: " + std::to_string(num_parts) +
                      " counts (stages x chunks) that add up to " + std::to_string(num_layers) + ", e.g. " +
                      text_of(even));
  };
  LayerSplit split;
  const char *begin = text.data(), *const text_end = text.data() + text.size();
  while (true) {
    int64_t count = -1;
    const auto [end, error] = std::from_chars(begin, text_end, count);
    if (error != std::errc() || count < 0 || (end != text_end && *end != ',')) refuse("is not a list of counts");
    split.push_back(count);
    if (end == text_end) break;
    begin = end + 1;
  }
  if (split.size() != static_cast<size_t>(num_parts)) refuse("has " + std::to_string(split.size()) + " parts");
  // By and by: no sum can pass the largest integer.
  int64_t left = num_layers;
  for (const int64_t count : split) {
    if (count > left) refuse("has more than " + std::to_string(num_layers) + " layers");
    left -= count;
  }
  if (left > 0)
    refuse("has " + std::to_string(num_layers - left) + " layers, the model has " + std::to_string(num_layers));
  return split;
}

}  // namespace lockstep
