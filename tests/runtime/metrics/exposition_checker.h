#pragma once

#include <map>
#include <string>
#include <vector>

namespace lockstep::metrics {

/// What Prometheus' text format 0.0.4 and promtool's lint would say against a page, and more: each metric has its HELP
/// and its TYPE line, then its samples, once; counters end in _total and are finite; histograms add up; no timestamps.
std::vector<std::string> exposition_problems(const std::string& text);

/// The samples of a page by name and labels, as they stand: `a_bucket{le="1"}`.
std::map<std::string, double> exposition_samples(const std::string& text);

}  // namespace lockstep::metrics
