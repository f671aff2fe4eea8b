#include "exposition_checker.h"

#include <cmath>
#include <regex>
#include <set>
#include <sstream>

namespace lockstep::metrics {
namespace {

const std::regex kHelp("# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) (([^\\\\]|\\\\\\\\|\\\\n)+)");
const std::regex kType("# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (gauge|counter|histogram|summary|untyped)");
const std::regex kSample(
    R"re(([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-zA-Z_][a-zA-Z0-9_]*="([^"\\]|\\[\\"n])*"(,[a-zA-Z_][a-zA-Z0-9_]*="([^"\\]|\\[\\"n])*")*\})? )re"
    R"re((NaN|[+-]Inf|-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?))re");
const std::regex kBound(R"re(\{le="(\+Inf|[0-9.e+-]+)"\})re");
const std::regex kOtherUnit(".*_(ms|milliseconds|minutes|hours|kilobytes|percent|gauge|counter|histogram)(_.*)?");

struct Family {
  std::string name, type;
  std::vector<std::pair<std::string, double>> samples;  // what follows its name, labels included
  std::vector<double> bounds;
};

double value_of(const std::string& text) {
  if (text == "NaN") return std::nan("");
  return text.ends_with("Inf") ? (text[0] == '-' ? -INFINITY : INFINITY) : std::stod(text);
}

class Checker {
 public:
  explicit Checker(const std::string& text) {
    if (!text.ends_with('\n')) complain("the last line has no end");
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) take(line);
    end_family();
  }
  std::vector<std::string> problems;

 private:
  void complain(const std::string& what) { problems.push_back(family_.name + ": " + what); }

  void take(const std::string& line) {
    std::smatch parts;
    if (std::regex_match(line, parts, kHelp)) {
      end_family();
      family_ = {parts[1]};
      // A counter's name is without its ending to newer readers.
      const size_t end = family_.name.ends_with("_total") ? family_.name.size() - 6 : family_.name.size();
      if (!names_.insert(family_.name.substr(0, end)).second) complain("stands twice");
    } else if (std::regex_match(line, parts, kType)) {
      if (parts[1] != family_.name || !family_.type.empty()) complain("TYPE does not follow HELP: " + line);
      family_.type = parts[2];
    } else if (std::regex_match(line, parts, kSample)) {
      sample(parts[1], parts[2], value_of(parts[6]));
    } else {
      complain("neither HELP, TYPE nor sample: " + line);
    }
  }

  void sample(const std::string& name, const std::string& labels, double value) {
    if (family_.type.empty()) complain("a sample before TYPE");
    if (!name.starts_with(family_.name)) return complain("a sample of another name: " + name);
    const std::string suffix = name.substr(family_.name.size());
    if (!series_.insert(name + labels).second) complain(name + labels + " stands twice");
    if (family_.type != "histogram" && !suffix.empty()) complain("a sample of another name: " + name);
    if (suffix == "_bucket") {
      std::smatch bound;
      if (!std::regex_match(labels, bound, kBound)) return complain("no bound: " + labels);
      family_.bounds.push_back(value_of(bound[1]));
    }
    family_.samples.emplace_back(suffix, value);
  }

  void end_family() {
    if (family_.name.empty()) return;
    if (family_.samples.empty()) complain("no samples");
    if (std::regex_match(family_.name, kOtherUnit)) complain("not in base units, or named by its type");
    const bool is_total = family_.name.ends_with("_total");
    if (is_total != (family_.type == "counter")) complain("counters, and only they, end in _total");
    if (family_.name.ends_with("_count") || family_.name.ends_with("_sum") || family_.name.ends_with("_bucket"))
      complain("ends as a part of a histogram");
    for (const auto& [suffix, value] : family_.samples) {
      if (is_total && !(value >= 0 && std::isfinite(value))) complain("a counter that is not finite");
    }
    if (family_.type == "histogram") end_histogram();
  }

  void end_histogram() {
    double before = 0, count = -1;
    size_t sums = 0, i = 0;
    for (const auto& [suffix, value] : family_.samples) {
      if (suffix == "_sum") ++sums;
      if (suffix == "_count") count = value;
      if (suffix != "_bucket") continue;
      if (value < before) complain("buckets are not cumulative");
      if (i > 0 && family_.bounds[i] <= family_.bounds[i - 1]) complain("bounds do not ascend");
      before = value;
      ++i;
    }
    if (i == 0 || !std::isinf(family_.bounds.back()) || before != count) complain("+Inf is not the count");
    if (sums != 1 || family_.samples.size() != i + 2) complain("not one sum and one count");
  }

  Family family_;
  std::set<std::string> names_, series_;
};

}  // namespace

std::vector<std::string> exposition_problems(const std::string& text) { return Checker(text).problems; }

std::map<std::string, double> exposition_samples(const std::string& text) {
  std::map<std::string, double> samples;
  std::istringstream lines(text);
  std::smatch parts;
  for (std::string line; std::getline(lines, line);) {
    if (std::regex_match(line, parts, kSample)) samples[parts[1].str() + parts[2].str()] = value_of(parts[6]);
  }
  return samples;
}

}  // namespace lockstep::metrics
