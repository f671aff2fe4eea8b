#include "node_watch.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include <lockstep/base/error.h>

namespace lockstep::launcher {
namespace {

using flight::Liveness;
using flight::NodeReport;
using flight::RankReport;
using flight::Verdict;
using std::chrono::milliseconds;
using std::chrono::nanoseconds;
using FlightCause = flight::Cause;

constexpr milliseconds kUnknownTimeout{120'000};  // as flight::rules_for
constexpr milliseconds kAnswerTakes{500};         // of an agent on a busy machine
constexpr milliseconds kStacksTake{900};          // the ranks' 400 ms, and the answer
constexpr milliseconds kAskAgain{500};
constexpr milliseconds kOthersCall{200};     // before a mismatch is believed: it is the many who are right
constexpr milliseconds kOthersDecide{1000};  // for what only an agent without a connection can know
constexpr milliseconds kTogether{700};       // nodes that fell silent within a heartbeat did so by one cause
constexpr milliseconds kSilent{1'000};       // one that does not answer is silent to the verdict
constexpr milliseconds kStragglersLook{1'000}, kStragglersPause{60'000};

int64_t ns(std::chrono::steady_clock::duration time) { return std::chrono::duration_cast<nanoseconds>(time).count(); }

bool is_dead(const RankReport& rank) {
  return !rank.has_ended_well() && (rank.liveness == Liveness::kGone || rank.exit_kind != 0);
}

bool has_said_why(const RankReport& rank) { return rank.exit_kind == 1 && !rank.exit_message.empty(); }

std::string short_name(const std::string& host) { return host.substr(0, host.find('.')); }

template <typename Range, typename Value>
bool contains(const Range& range, const Value& value) {
  return std::find(range.begin(), range.end(), value) != range.end();
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

bool are_all_stopped(const std::vector<NodeReport>& nodes) {
  size_t count = 0;
  for (const NodeReport& node : nodes) {
    for (const RankReport& rank : node.ranks) {
      if (rank.liveness != Liveness::kStopped) return false;
      ++count;
    }
  }
  return count > 1;
}

}  // namespace

NodeWatch::NodeWatch(std::vector<Node> nodes, Clock::time_point now) : looked_(now) {
  for (Node& node : nodes) {
    State state;
    state.place = std::move(node);
    nodes_.push_back(std::move(state));
  }
}

std::optional<size_t> NodeWatch::node_of(const Heartbeat& heartbeat) const {
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (short_name(nodes_[i].place.host) == short_name(heartbeat.host)) return i;
  }
  for (size_t i = 0; i < nodes_.size() && !heartbeat.ranks.empty(); ++i) {  // known here by another name
    if (contains(nodes_[i].place.ranks, heartbeat.ranks[0].rank)) return i;
  }
  return std::nullopt;
}

void NodeWatch::heard(size_t node, const Heartbeat& heartbeat, Clock::time_point now) {
  State& state = nodes_[node];
  if (!state.was_heard || heartbeat.step != state.step) state.moved = now;
  state.was_heard = true;
  state.has_ended = false;
  state.heard = now;
  state.timeout_ms = heartbeat.timeout_ms;
  state.step = heartbeat.step;
  state.out_of_memory_kills = heartbeat.out_of_memory_kills;
  state.times = heartbeat.ranks;
  if (heartbeat.ranks.empty()) return;
  state.place.ranks.clear();
  for (const RankTime& rank : heartbeat.ranks) state.place.ranks.push_back(rank.rank);
}

void NodeWatch::reported(size_t node, Report report, Clock::time_point now) {
  State& state = nodes_[node];
  state.heard = state.reported = now;
  state.answered = std::max(state.answered, report.number);
  std::vector<int32_t> dead;
  for (const RankReport& rank : report.node.ranks) {
    has_spoken_ |= has_said_why(rank);
    if (is_dead(rank) && !has_said_why(rank)) dead.push_back(rank.rank);
    for (const flight::WaitReport& wait : rank.waits) is_called_ |= wait.for_ns >= ns(timeout());
  }
  if (first_dead_.empty()) first_dead_ = dead;
  is_called_ |= !dead.empty();
  state.report = std::move(report.node);
}

void NodeWatch::ended(size_t node, Clock::time_point now) {
  nodes_[node].has_ended = true;
  nodes_[node].heard = now;
}

milliseconds NodeWatch::timeout() const {
  int64_t longest = 0;
  for (const State& node : nodes_) longest = std::max(longest, node.timeout_ms);
  return longest > 0 ? milliseconds(longest) : kUnknownTimeout;
}

bool NodeWatch::is_silent(const State& node, milliseconds limit, Clock::time_point now) const {
  return node.was_heard && !node.has_ended && now - node.heard >= limit;
}

void NodeWatch::forgive_pause(Clock::time_point now) {
  if (now - looked_ > std::max<Clock::duration>(timeout() / 2, std::chrono::seconds(2))) {
    for (State& node : nodes_) node.heard = node.moved = now;
    patient_until_ = now + timeout();
  }
  looked_ = now;
}

std::vector<std::pair<size_t, Ask>> NodeWatch::look(Clock::time_point now) {
  if (finding_) return {};
  forgive_pause(now);
  if (find_lost(now)) return {};
  if (phase_ == Phase::kCalm) return is_suspicious(now) ? ask(now) : std::vector<std::pair<size_t, Ask>>();
  if (!have_answered() && now < deadline_) return {};
  if (phase_ == Phase::kAsked) return decide(now);
  conclude();
  return {};
}

bool NodeWatch::is_suspicious(Clock::time_point now) const {
  if (now < quiet_until_) return false;
  return is_called_ || std::any_of(nodes_.begin(), nodes_.end(),
                                   [&](const State& node) { return is_silent(node, timeout() - kAskAgain, now); });
}

bool NodeWatch::owes_answer(const State& node) const {
  return node.was_heard && !node.has_ended && node.answered < asked_;
}

bool NodeWatch::have_answered() const {
  return std::none_of(asked_nodes_.begin(), asked_nodes_.end(), [&](size_t node) { return owes_answer(nodes_[node]); });
}

std::vector<size_t> NodeWatch::unanswered() const {
  std::vector<size_t> nodes;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (owes_answer(nodes_[i])) nodes.push_back(i);
  }
  return nodes;
}

std::vector<std::pair<size_t, Ask>> NodeWatch::ask(Clock::time_point now) {
  ++asked_;
  asked_nodes_.clear();
  is_called_ = false;
  std::vector<std::pair<size_t, Ask>> asks;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (!nodes_[i].was_heard || nodes_[i].has_ended) continue;
    asks.emplace_back(i, Ask{.number = asked_, .tail = flight::kNumEntries, .stacks = {}});
    if (!is_silent(nodes_[i], kSilent, now)) asked_nodes_.push_back(i);
  }
  phase_ = Phase::kAsked;
  deadline_ = now + kAnswerTakes;
  return asks;
}

// One of which only the ranks are known, for the verdict to name its host.
NodeReport NodeWatch::placeholder(const State& node, Clock::time_point now) const {
  NodeReport report;
  report.heard_ago_ns = std::max(ns(now - node.heard), ns(kSilent) + 1);
  for (const int32_t rank : node.place.ranks) report.ranks.push_back({.rank = rank});
  report.host = node.place.host;
  return report;
}

std::vector<NodeReport> NodeWatch::view(Clock::time_point now) const {
  std::vector<NodeReport> reports;
  for (const State& node : nodes_) {
    const bool is_current = node.report && (node.has_ended || node.answered >= asked_ || now - node.reported < kSilent);
    if (is_current && !is_silent(node, kSilent, now)) {
      reports.push_back(*node.report);
      // Of several that died the first is the cause; mpirun ends the others.
      std::erase_if(reports.back().ranks, [&](const RankReport& rank) {
        return is_dead(rank) && !has_said_why(rank) && !contains(first_dead_, rank.rank);
      });
    } else if (node.was_heard && !node.has_ended) {
      reports.push_back(placeholder(node, now));
    }
  }
  return reports;
}

// How long a node says nothing does not depend on what its ranks do: its agent has nothing else to do.
bool NodeWatch::find_lost(Clock::time_point now) {
  if (now < patient_until_) return false;
  std::vector<const State*> lost;
  bool is_certain = false;
  Clock::time_point others_moved{};
  for (const State& node : nodes_) {
    if (is_silent(node, std::max(timeout() - kTogether, timeout() / 2), now)) {
      lost.push_back(&node);
      is_certain |= is_silent(node, timeout(), now);
    } else if (node.was_heard) {
      others_moved = std::max(others_moved, node.moved);
    }
  }
  if (!is_certain || now - others_moved < timeout() / 2) return false;  // it trains on: an agent is gone, no host
  finding_ = loss_of(lost, now);
  return true;
}

std::optional<ClusterFinding> NodeWatch::loss(Clock::time_point now) const {
  std::vector<const State*> lost;
  for (const size_t node : unanswered()) lost.push_back(&nodes_[node]);
  return finding_ || lost.empty() ? std::nullopt : std::optional(loss_of(lost, now));
}

ClusterFinding NodeWatch::loss_of(const std::vector<const State*>& lost, Clock::time_point now) const {
  std::vector<NodeReport> nodes = view(now);
  Verdict verdict{.cause = FlightCause::kAllArrived};
  Clock::time_point heard = now;
  for (const State* node : lost) {
    verdict.hosts.push_back(node->place.host);
    verdict.culprits.insert(verdict.culprits.end(), node->place.ranks.begin(), node->place.ranks.end());
    heard = std::min(heard, node->heard);
  }
  flight::Rules rules = flight::rules_for(nodes);
  // The others have waited for nearly as long, in whatever they are busy with.
  rules.timeout_ns = rules.long_timeout_ns = rules.storage_timeout_ns = ns(timeout()) / 2;
  rules.silent_ns = ns(kSilent);
  Verdict judged = flight::judge(nodes, rules);
  if (judged.cause == FlightCause::kAllArrived && judged.hosts == verdict.hosts) {  // it knows the call that is held up
    verdict = std::move(judged);
  } else {
    std::array<char, 32> silence{};
    std::snprintf(silence.data(), silence.size(), "%.1f s", static_cast<double>(ns(now - heard)) / 1e9);
    verdict.message = (lost.size() == 1 ? "host " : "hosts ") + joined(verdict.hosts) +
                      (lost.size() == 1 ? " is" : " are") + " silent: nothing was heard from there for " +
                      silence.data() +
                      ". Mend: see whether the host is up and its network works. Run the same command " +
                      "again to go on from the last checkpoint.";
  }
  ClusterFinding finding = finding_of(std::move(verdict), std::move(nodes), static_cast<int>(ExitCode::kRunAgain));
  finding.cause = Cause::kLostHost;
  const auto speaks = [&](const State& node) {
    return node.was_heard && std::find(lost.begin(), lost.end(), &node) == lost.end();
  };
  // All at once is this host's own network, or all of them: the next start sees which answer.
  if (lost.size() == 1 || std::any_of(nodes_.begin(), nodes_.end(), speaks))
    for (const State* node : lost) finding.lost_hosts.push_back(node->place.host);
  return finding;
}

std::vector<std::pair<size_t, Ask>> NodeWatch::decide(Clock::time_point now) {
  phase_ = Phase::kCalm;
  quiet_until_ = now + kAskAgain;
  std::vector<NodeReport> nodes = view(now);
  flight::Rules rules = flight::rules_for(nodes);
  rules.silent_ns = ns(kSilent);
  if (are_all_stopped(nodes)) patient_until_ = now + timeout();
  if (now < patient_until_) return {};
  Verdict verdict = flight::judge(nodes, rules);
  if (verdict.cause != FlightCause::kAllArrived) undecided_since_ = {};
  if (verdict.cause == FlightCause::kNone) return {};
  if (verdict.cause == FlightCause::kGone && verdict.waited_ns < rules.timeout_ns) {
    if (!has_spoken_ && !first_dead_.empty() && (!death_ || death_->first.group.empty()))
      death_ = {std::move(verdict), std::move(nodes)};
    is_called_ = true;  // until mpirun has ended the job
    return {};
  }
  if (verdict.cause == FlightCause::kMismatch && !has_seen_mismatch_) {
    has_seen_mismatch_ = is_called_ = true;
    quiet_until_ = now + kOthersCall;
    return {};
  }
  if (verdict.cause == FlightCause::kAllArrived) {
    if (undecided_since_ == Clock::time_point()) undecided_since_ = now;
    const bool has_silent = std::any_of(nodes_.begin(), nodes_.end(), [&](const State& node) {
      return is_silent(node, kSilent, now);
    });  // whether it is lost is soon known
    const bool has_unknown =
        std::any_of(nodes_.begin(), nodes_.end(), [](const State& node) { return !node.was_heard; });
    const Clock::duration patience = has_silent    ? Clock::duration(timeout() + kOthersDecide)
                                     : has_unknown ? Clock::duration(kOthersDecide)
                                                   : Clock::duration::zero();
    is_called_ = true;
    if (now - undecided_since_ < patience) return {};
  }
  first_ = std::move(verdict);
  first_view_ = std::move(nodes);
  return ask_for_stacks(now);
}

std::vector<std::pair<size_t, Ask>> NodeWatch::ask_for_stacks(Clock::time_point now) {
  ++asked_;
  asked_nodes_.clear();
  std::vector<std::pair<size_t, Ask>> asks;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (is_silent(nodes_[i], kSilent, now) || !nodes_[i].report) continue;
    Ask ask{.number = asked_, .tail = flight::kNumEntries, .stacks = {}};
    for (const RankReport& rank : nodes_[i].report->ranks) {
      const bool can_say = rank.liveness != Liveness::kStopped && rank.liveness != Liveness::kGone;
      if (can_say && contains(first_.culprits, rank.rank)) ask.stacks.push_back(rank.rank);
    }
    if (ask.stacks.empty()) continue;
    asks.emplace_back(i, std::move(ask));
    asked_nodes_.push_back(i);
  }
  phase_ = Phase::kAskedForStacks;
  deadline_ = now + kStacksTake;
  if (asks.empty()) conclude();
  return asks;
}

void NodeWatch::conclude() {
  std::vector<NodeReport> nodes = first_view_;
  for (NodeReport& report : nodes) {  // with the stacks
    for (const size_t asked : asked_nodes_) {
      const State& node = nodes_[asked];
      if (node.report && node.answered >= asked_ && node.report->host == report.host) report = *node.report;
    }
  }
  flight::Rules rules = flight::rules_for(nodes);
  rules.silent_ns = ns(kSilent);
  Verdict verdict = flight::judge(nodes, rules);
  if (verdict.cause != first_.cause || verdict.culprits != first_.culprits) verdict = first_;
  finding_ = finding_of(std::move(verdict), std::move(nodes), static_cast<int>(ExitCode::kHang));
}

ClusterFinding NodeWatch::finding_of(Verdict verdict, std::vector<NodeReport> nodes, int exit_code) const {
  ClusterFinding finding{.exit_code = exit_code, .verdict = std::move(verdict), .nodes = std::move(nodes)};
  for (const NodeReport& node : finding.nodes) {
    for (const RankReport& rank : node.ranks) {
      const bool is_first = !finding.verdict.culprits.empty() && rank.rank == finding.verdict.culprits[0];
      if (is_first && rank.step >= 0) finding.step = rank.step;
    }
  }
  return finding;
}

std::string NodeWatch::stragglers(Clock::time_point now) {
  if (now < stragglers_next_) return "";
  stragglers_next_ = now + kStragglersLook;
  std::vector<NodeReport> nodes;
  for (const State& node : nodes_) {
    if (!node.was_heard || node.has_ended || is_silent(node, kSilent, now)) continue;
    NodeReport& report = nodes.emplace_back();
    report.host = node.place.host;
    for (const RankTime& time : node.times) {
      RankReport& rank = report.ranks.emplace_back();
      rank.rank = time.rank;
      rank.timed_steps = time.timed_steps;
      rank.compute_ns = time.compute_ns;
    }
  }
  const auto stragglers = flight::find_stragglers(nodes);
  if (stragglers.empty()) return "";
  stragglers_next_ = now + kStragglersPause;
  return flight::describe(stragglers);
}

std::optional<ClusterFinding> NodeWatch::death(std::optional<int32_t> rank) const {
  if (finding_ || has_spoken_ || first_dead_.empty()) return std::nullopt;
  ClusterFinding finding;
  if (death_ && (!rank || contains(death_->first.culprits, *rank))) {
    finding = finding_of(death_->first, death_->second, static_cast<int>(ExitCode::kRunAgain));
  } else {  // it went too fast to ask, or another one was the first
    std::vector<NodeReport> nodes;
    for (const State& node : nodes_) {
      if (node.report) nodes.push_back(*node.report);
    }
    const auto is_known = [&](int32_t wanted) {
      return std::any_of(nodes.begin(), nodes.end(), [&](const NodeReport& node) {
        return std::any_of(node.ranks.begin(), node.ranks.end(),
                           [&](const RankReport& one) { return one.rank == wanted && is_dead(one); });
      });
    };
    const std::vector<int32_t> culprits = rank && is_known(*rank) ? std::vector<int32_t>{*rank} : first_dead_;
    for (NodeReport& node : nodes) {
      std::erase_if(node.ranks, [&](const RankReport& one) { return is_dead(one) && !contains(culprits, one.rank); });
    }
    Verdict verdict = flight::judge(nodes, flight::rules_for(nodes));
    if (verdict.cause != FlightCause::kGone) return std::nullopt;
    finding = finding_of(std::move(verdict), std::move(nodes), static_cast<int>(ExitCode::kRunAgain));
  }
  finding.cause = Cause::kKilled;
  for (const State& node : nodes_) {
    const bool is_there = std::any_of(node.place.ranks.begin(), node.place.ranks.end(),
                                      [&](int32_t one) { return contains(finding.verdict.culprits, one); });
    finding.is_out_of_memory |= is_there && node.out_of_memory_kills > 0;
  }
  return finding;
}

}  // namespace lockstep::launcher
