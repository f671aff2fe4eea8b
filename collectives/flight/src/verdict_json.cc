#include <algorithm>

#include <nlohmann/json.hpp>

#include <lockstep/flight/verdict.h>

namespace lockstep::flight {
namespace {

nlohmann::ordered_json culprit_json(const RankReport& rank, const std::string& host) {
  return {{"rank", rank.rank},
          {"host", host},
          {"pid", rank.pid},
          {"liveness", name_of(rank.liveness)},
          {"wchan", rank.wchan},
          {"step", rank.step},
          {"phase", name_of(rank.phase)},
          {"exit_kind", rank.exit_kind},
          {"exit_value", rank.exit_value},
          {"exit_message", rank.exit_message},
          {"stack", rank.stack}};
}

}  // namespace

std::string verdict_json(const Verdict& verdict, std::span<const NodeReport> nodes) {
  nlohmann::ordered_json culprits = nlohmann::ordered_json::array();
  for (const NodeReport& node : nodes) {
    for (const RankReport& rank : node.ranks) {
      if (std::count(verdict.culprits.begin(), verdict.culprits.end(), rank.rank) > 0)
        culprits.push_back(culprit_json(rank, node.host));
    }
  }
  const Call& call = verdict.call.call;
  const nlohmann::ordered_json record = {{"cause", name_of(verdict.cause)},
                                         {"culprits", verdict.culprits},
                                         {"hosts", verdict.hosts},
                                         {"group", verdict.group},
                                         {"sequence", verdict.call.sequence},
                                         {"op", verdict.group.empty() ? "" : name_of(call.op)},
                                         {"dtype", name_of(call.dtype)},
                                         {"count", call.count},
                                         {"root", call.root},
                                         {"bucket", verdict.call.bucket},
                                         {"label", verdict.call.label},
                                         {"waiting", verdict.waiting},
                                         {"waited_s", static_cast<double>(verdict.waited_ns) / 1e9},
                                         {"message", verdict.message},
                                         {"culprit_reports", std::move(culprits)}};
  return record.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace lockstep::flight
