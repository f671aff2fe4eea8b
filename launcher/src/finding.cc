#include "finding.h"

#include <ostream>

namespace lockstep::launcher {

std::ostream& operator<<(std::ostream& out, const Finding& finding) {
  out << (finding.good ? "ok    " : "BAD   ") << finding.what << ": " << finding.found << "\n";
  if (!finding.good) out << "      mend: " << finding.mend << "\n";
  return out;
}

nlohmann::ordered_json to_json(const Finding& finding) {
  return {{"what", finding.what},
          {"good", finding.good},
          {"found", finding.found},
          {"mend", finding.good ? "" : finding.mend},
          {"code", finding.good ? 0 : static_cast<int>(finding.code)}};
}

std::vector<Finding> parse_findings(const std::string& said) try {
  std::vector<Finding> findings;
  const size_t begin = said.find("[\n"), end = said.rfind(']');
  if (begin == std::string::npos || end == std::string::npos || end < begin) return {};
  for (const auto& line : nlohmann::json::parse(said.substr(begin, end - begin + 1)))
    findings.push_back({line.at("what"), line.at("good"), line.at("found"), line.at("mend"),
                        static_cast<ExitCode>(line.at("code").get<int>())});
  return findings;
} catch (const nlohmann::json::exception&) {
  return {};
}

}  // namespace lockstep::launcher
