#include <algorithm>
#include <cstdio>
#include <map>
#include <optional>
#include <set>
#include <sstream>

#include <lockstep/flight/verdict.h>

#include "waits.h"

namespace lockstep::flight {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

std::string seconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", static_cast<double>(ns) / 1e9);
  return text;
}

std::string rank_list(const std::vector<int32_t>& ranks) {  // sorted: "0-2, 5"
  std::string text;
  for (size_t i = 0; i < ranks.size();) {
    size_t last = i;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(ranks[i]);
    if (last > i) text += (last == i + 1 ? ", " : "-") + std::to_string(ranks[last]);
    i = last + 1;
  }
  return text;
}

std::string ranks_text(const std::vector<int32_t>& ranks) {
  return (ranks.size() == 1 ? "rank " : "ranks ") + rank_list(ranks);
}

// "all_reduce 1204 of group 'data' (bucket 12, block3.query.weight; 1024 x f32)"
std::string call_text(const CallReport& call, const std::string& group) {
  const Call& what = call.call;
  std::string text = std::string(name_of(what.op)) + " " + std::to_string(call.sequence) + " of group '" + group + "'";
  std::string details;
  const auto add = [&](const std::string& detail) { details += (details.empty() ? "" : ", ") + detail; };
  if (call.bucket >= 0) add("bucket " + std::to_string(call.bucket));
  if (!call.label.empty()) add(call.label);
  if (what.dtype != Dtype::kNone) add((what.count > 0 ? std::to_string(what.count) + " x " : "") + name_of(what.dtype));
  if (what.reduction == Reduction::kMax) add("max");
  if (what.reduction == Reduction::kMin) add("min");
  if (what.root >= 0) add((is_message(what.op) ? "peer " : "root ") + std::to_string(what.root));
  return details.empty() ? text : text + " (" + details + ")";
}

int64_t patience_in(Phase phase, const Rules& rules) {
  if (phase == Phase::kTraining) return rules.timeout_ns;
  return phase == Phase::kLoading || phase == Phase::kSaving ? rules.storage_timeout_ns : rules.long_timeout_ns;
}

class Judge {
 public:
  Judge(std::span<const NodeReport> nodes, const Rules& rules) : view_(nodes, rules.silent_ns), rules_(rules) {}

  Verdict judge() {
    follow_waits();
    for (const auto look : {&Judge::find_mismatch, &Judge::find_gone, &Judge::find_absent, &Judge::find_silent,
                            &Judge::find_circle, &Judge::find_stalled}) {
      if (auto verdict = (this->*look)()) return *verdict;
    }
    return {};
  }

 private:
  /// A rank at which waiting ends, and the call in which it has kept somebody waiting for longest.
  struct Root {
    const CallReport* call = nullptr;
    int64_t waited_ns = 0;
  };

  void follow_waits();
  std::optional<Verdict> find_mismatch() const;
  std::optional<Verdict> mismatch_in(uint64_t group) const;
  std::optional<Verdict> find_gone() const;
  std::optional<Verdict> find_absent() const;
  std::optional<Verdict> find_silent() const;
  std::optional<Verdict> find_circle() const;
  std::optional<Verdict> find_stalled() const;
  std::vector<const Blocked*> waits_back(int32_t rank, const Blocked& mine) const;
  std::vector<int32_t> waiting_in(const CallReport& call, uint64_t group) const;

  bool is_gone(int32_t rank) const {
    const RankReport* report = view_.find(rank);
    return report && !report->has_ended_well() && (report->liveness == Liveness::kGone || report->exit_kind != 0);
  }
  int64_t patience_with(int32_t rank) const {
    const RankReport* report = view_.find(rank);
    return report && !view_.is_stuck(rank) ? patience_in(report->phase, rules_) : rules_.timeout_ns;
  }
  int64_t longest_patience() const {  // those who wait may all be in the middle of something long
    int64_t patience = rules_.timeout_ns;
    for (const int32_t rank : view_.ranks())
      patience = std::max(patience, patience_in(view_.find(rank)->phase, rules_));
    return patience;
  }
  std::string group_name(const CallReport& call) const {
    const GroupReport* group = view_.group(call.group);
    return group ? group->name : "?";
  }
  std::string describe(int32_t rank) const;
  std::string whereabouts(int32_t rank) const;
  std::string stack_of(int32_t rank) const;
  /// Fills in the call that is held up and who waits in it.
  void set_call(Verdict& verdict, const CallReport& call) const;
  std::string waiting_text(const Verdict& verdict) const;

  WorldView view_;
  const Rules& rules_;
  std::map<int32_t, Root> roots_;
  std::vector<Blocked> arrived_;  // calls in which all are there
};

// Everybody who waits points at those who hold him up; those who wait in turn are looked at themselves.
void Judge::follow_waits() {
  for (const int32_t rank : view_.ranks()) {
    for (const Blocked& blocked : view_.blocked(rank)) {
      const std::vector<int32_t> holders = view_.holders(rank, *blocked.call);
      if (holders.empty()) arrived_.push_back(blocked);
      for (const int32_t holder : holders) {
        if (view_.find(holder) && !view_.is_stuck(holder) && !view_.is_idle(holder)) continue;
        Root& root = roots_[holder];
        if (root.call == nullptr || blocked.for_ns > root.waited_ns) root = {blocked.call, blocked.for_ns};
      }
    }
  }
}

void Judge::set_call(Verdict& verdict, const CallReport& call) const {
  verdict.call = call;
  verdict.group = group_name(call);
  for (const int32_t rank : view_.ranks()) {
    for (const Blocked& blocked : view_.blocked(rank)) {
      const bool is_same = blocked.call->group == call.group && blocked.call->sequence == call.sequence &&
                           blocked.call->call.op == call.call.op;
      const bool is_culprit = std::count(verdict.culprits.begin(), verdict.culprits.end(), rank) > 0;
      if (!is_same || is_culprit) continue;
      verdict.waiting.push_back(rank);
      verdict.waited_ns = std::max(verdict.waited_ns, blocked.for_ns);
    }
  }
  std::sort(verdict.waiting.begin(), verdict.waiting.end());
  verdict.waiting.erase(std::unique(verdict.waiting.begin(), verdict.waiting.end()), verdict.waiting.end());
}

std::string Judge::waiting_text(const Verdict& verdict) const {
  if (verdict.waiting.empty()) return "";
  return ranks_text(verdict.waiting) + (verdict.waiting.size() == 1 ? " has" : " have") + " waited there for " +
         seconds(verdict.waited_ns) + ". ";
}

// "rank 3 (host gpu07, pid 4711)"
std::string Judge::describe(int32_t rank) const {
  const RankReport* report = view_.find(rank);
  const std::string host = view_.host_of(rank);
  if (!report) return "rank " + std::to_string(rank) + (host.empty() ? "" : " (host " + host + ")");
  return "rank " + std::to_string(rank) + " (host " + host + ", pid " + std::to_string(report->pid) + ")";
}

// What it did last.
std::string Judge::whereabouts(int32_t rank) const {
  const RankReport* report = view_.find(rank);
  if (!report) return "";
  std::string text = "Rank " + std::to_string(rank) + " is " + name_of(report->phase);
  if (report->step >= 0) text += " at step " + std::to_string(report->step);
  if (!report->calls.empty()) {
    const auto last = std::max_element(report->calls.begin(), report->calls.end(), [](const auto& a, const auto& b) {
      return (a.is_done() ? a.done_ago_ns : a.begun_ago_ns) > (b.is_done() ? b.done_ago_ns : b.begun_ago_ns);
    });
    text += "; the last it " + std::string(last->is_done() ? "finished" : "began") + " was " +
            call_text(*last, group_name(*last)) + ", " +
            seconds(last->is_done() ? last->done_ago_ns : last->begun_ago_ns) + " ago";
  }
  return text + ". ";
}

std::string Judge::stack_of(int32_t rank) const {
  const RankReport* report = view_.find(rank);
  if (!report) return "";
  if (!report->wchan.empty()) return "The kernel has it in " + report->wchan + ". ";
  std::string frames;  // innermost first, on one line
  std::istringstream lines(report->stack);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty()) frames += (frames.empty() ? "" : " < ") + line;
  }
  return frames.empty() ? "" : "Stack of rank " + std::to_string(rank) + ": " + frames + ". ";
}

std::optional<Verdict> Judge::find_mismatch() const {
  std::set<uint64_t> groups;
  for (const int32_t rank : view_.ranks()) {
    for (const GroupReport& group : view_.find(rank)->groups) groups.insert(group.id);
  }
  for (const uint64_t group : groups) {
    if (auto verdict = mismatch_in(group)) return verdict;
  }
  return {};
}

// The first call of a group whose fingerprints differ. One that only some have made says nothing.
std::optional<Verdict> Judge::mismatch_in(uint64_t group) const {
  std::map<uint64_t, std::map<uint64_t, std::vector<std::pair<int32_t, const CallReport*>>>>
      sides;  // sequence, fingerprint
  for (const int32_t rank : view_.ranks()) {
    for (const CallReport& call : view_.find(rank)->calls) {
      if (call.group == group && !is_message(call.call.op))
        sides[call.sequence][call.fingerprint].emplace_back(rank, &call);
    }
  }
  const auto found = std::find_if(sides.begin(), sides.end(), [](const auto& call) { return call.second.size() > 1; });
  if (found == sides.end()) return {};
  // Most ranks are right; of two equal sides, the one with the lowest rank.
  const auto* majority = &found->second.begin()->second;
  for (const auto& [fingerprint, side] : found->second) {
    if (side.size() > majority->size() || (side.size() == majority->size() && side[0].first < (*majority)[0].first))
      majority = &side;
  }
  Verdict verdict{.cause = Cause::kMismatch};
  const CallReport* theirs = nullptr;
  std::vector<int32_t> others;
  for (const auto& [rank, call] : *majority) others.push_back(rank);
  for (const auto& [fingerprint, side] : found->second) {
    if (&side == majority) continue;
    for (const auto& [rank, call] : side) {
      verdict.culprits.push_back(rank);
      if (rank == *std::min_element(verdict.culprits.begin(), verdict.culprits.end())) theirs = call;
    }
  }
  std::sort(verdict.culprits.begin(), verdict.culprits.end());
  const CallReport& right = *(*majority)[0].second;
  verdict.call = right;
  verdict.group = group_name(right);
  verdict.message = describe(verdict.culprits[0]) +
                    (verdict.culprits.size() > 1 ? " and " + std::to_string(verdict.culprits.size() - 1) + " more (" +
                                                       rank_list(verdict.culprits) + ")"
                                                 : "") +
                    " called " + call_text(*theirs, verdict.group) + ", but " + ranks_text(others) + " called " +
                    call_text(right, verdict.group) + ". ";
  const bool is_old = theirs->call.op == right.call.op && theirs->call.dtype == right.call.dtype &&
                      theirs->call.count == right.call.count && theirs->call.root == right.call.root &&
                      theirs->call.reduction == right.call.reduction;
  if (is_old) verdict.message += "They have differed since before this call; older ones are not kept. ";
  verdict.message += whereabouts(verdict.culprits[0]) + stack_of(verdict.culprits[0]) +
                     "Mend: all ranks of a group must make the same calls in the same order; look for a branch that "
                     "hangs on the rank or on its data.";
  return verdict;
}

std::optional<Verdict> Judge::find_gone() const {
  Verdict verdict{.cause = Cause::kGone};
  // Those that died of something of their own come before those that may have been killed because of it.
  uint32_t most_telling = 0;
  for (const int32_t rank : view_.ranks()) {
    if (!is_gone(rank)) continue;
    const uint32_t kind = view_.find(rank)->exit_kind;
    if (kind > most_telling) verdict.culprits.clear();
    most_telling = std::max(most_telling, kind);
    if (kind == most_telling) verdict.culprits.push_back(rank);
  }
  if (verdict.culprits.empty()) return {};
  const int32_t culprit = verdict.culprits[0];
  const RankReport& report = *view_.find(culprit);
  verdict.message = describe(culprit) + " is gone";
  if (report.exit_kind == 2) verdict.message += ": it died of signal " + std::to_string(report.exit_value);
  if (report.exit_kind == 1) verdict.message += ": it ended with code " + std::to_string(report.exit_value);
  if (!report.exit_message.empty()) verdict.message += " (" + report.exit_message + ")";
  if (verdict.culprits.size() > 1)
    verdict.message += ", and with it ranks " + rank_list({verdict.culprits.begin() + 1, verdict.culprits.end()});
  const auto root = std::find_if(roots_.begin(), roots_.end(), [&](const auto& root) { return root.first == culprit; });
  if (root != roots_.end()) {
    set_call(verdict, *root->second.call);
    verdict.message +=
        ", and never arrived at " + call_text(verdict.call, verdict.group) + ": " + waiting_text(verdict);
  } else {
    verdict.message += ". ";
  }
  verdict.message += whereabouts(culprit) +
                     "Mend: read its last lines; a death without any may be the kernel's for lack of "
                     "memory (dmesg). Run the same command again to go on from the last checkpoint.";
  return verdict;
}

// Alive, or stopped, and in no collective.
std::optional<Verdict> Judge::find_absent() const {
  Verdict verdict{.cause = Cause::kNeverArrived};
  const Root* longest = nullptr;
  for (const auto& [rank, root] : roots_) {
    if (!view_.find(rank) || is_gone(rank)) continue;
    const int64_t patience = patience_with(rank);
    if (root.waited_ns < patience || view_.idle_ns(rank) < patience) continue;
    verdict.culprits.push_back(rank);
    if (!longest || root.waited_ns > longest->waited_ns) longest = &root;
  }
  if (!longest) return {};
  set_call(verdict, *longest->call);
  const int32_t culprit = verdict.culprits[0];
  const RankReport& report = *view_.find(culprit);
  const bool is_stopped = report.liveness == Liveness::kStopped;
  verdict.message = describe(culprit);
  if (is_stopped) verdict.message += " is stopped (SIGSTOP, or a debugger) and";
  if (report.has_ended_well()) verdict.message += " has ended with code " + std::to_string(report.exit_value) + " and";
  verdict.message += view_.has_begun(culprit, verdict.call) && !is_message(verdict.call.call.op)
                         ? " began but does not go on with "
                         : " never arrived at ";
  verdict.message += call_text(verdict.call, verdict.group) + ": " + waiting_text(verdict);
  if (verdict.culprits.size() > 1)
    verdict.message +=
        "The same is true of ranks " + rank_list({verdict.culprits.begin() + 1, verdict.culprits.end()}) + ". ";
  verdict.message += whereabouts(culprit) + stack_of(culprit);
  verdict.message += is_stopped
                         ? "Mend: find who stopped it. Run the same command again to go on from the last checkpoint."
                         : "Mend: see what it does there; --hang_timeout_s gives it longer.";
  return verdict;
}

// Nothing is known of those that are waited for.
std::optional<Verdict> Judge::find_silent() const {
  Verdict verdict{.cause = Cause::kAllArrived};
  const Root* longest = nullptr;
  std::set<std::string> silent;
  for (const auto& [rank, root] : roots_) {
    if (view_.find(rank)) continue;
    if (root.waited_ns < longest_patience()) continue;
    verdict.culprits.push_back(rank);
    if (const std::string host = view_.host_of(rank); !host.empty()) silent.insert(host);
    if (!longest || root.waited_ns > longest->waited_ns) longest = &root;
  }
  if (!longest) return {};
  set_call(verdict, *longest->call);
  verdict.hosts.assign(silent.begin(), silent.end());
  std::string hosts;
  for (const std::string& host : silent) hosts += (hosts.empty() ? "" : ", ") + host;
  verdict.message = hosts.empty() ? "nothing is known here of " + ranks_text(verdict.culprits)
                                  : "host " + hosts + " is silent, with " + ranks_text(verdict.culprits);
  verdict.message += ", and " + call_text(verdict.call, verdict.group) + " does not end: " + waiting_text(verdict) +
                     "Mend: " +
                     (hosts.empty() ? "read what the agents of the other hosts say"
                                    : "see whether the host is up and its network works") +
                     ". Run the same command again to go on from the last checkpoint.";
  return verdict;
}

// All who are waited for wait themselves, for each other: groups called in different order. Of two such calls, the
// ranks that are in both groups and wait in the one that fewer of them wait in have it wrong; of two equal sides, the
// one in whose call fewer wait in all.
std::optional<Verdict> Judge::find_circle() const {
  if (!roots_.empty() || !arrived_.empty()) return {};
  const Blocked *odd = nullptr, *other = nullptr;
  std::vector<int32_t> culprits;
  int64_t least_waited = INT64_MAX;
  for (const int32_t rank : view_.ranks()) {
    for (const Blocked& mine : view_.blocked(rank)) {
      least_waited = std::min(least_waited, mine.for_ns);
      for (const Blocked* theirs : waits_back(rank, mine)) {
        std::vector<int32_t> here = waiting_in(*mine.call, theirs->call->group);
        const std::vector<int32_t> there = waiting_in(*theirs->call, mine.call->group);
        const auto weight = [&](const std::vector<int32_t>& ranks, const CallReport& call) {
          return std::pair(ranks.size(), waiting_in(call, call.group).size());
        };
        if (here.empty() || weight(here, *mine.call) > weight(there, *theirs->call)) continue;
        if (odd != nullptr && weight(here, *mine.call) >= weight(culprits, *odd->call)) continue;
        odd = &mine;
        other = theirs;
        culprits = std::move(here);
      }
    }
  }
  if (odd == nullptr || least_waited < rules_.timeout_ns) return {};
  Verdict verdict{.cause = Cause::kMismatch, .culprits = std::move(culprits)};
  set_call(verdict, *other->call);
  verdict.message = describe(verdict.culprits[0]) + " waits in " + call_text(*odd->call, group_name(*odd->call)) +
                    " for ranks that wait in " + call_text(*other->call, verdict.group) +
                    " for it: " + waiting_text(verdict) + whereabouts(verdict.culprits[0]) +
                    stack_of(verdict.culprits[0]) + "Mend: all ranks must call their groups in the same order.";
  return verdict;
}

// Waits of those who hold `rank` up, for somebody who waits where it does.
std::vector<const Blocked*> Judge::waits_back(int32_t rank, const Blocked& mine) const {
  std::vector<const Blocked*> found;
  for (const int32_t holder : view_.holders(rank, *mine.call)) {
    for (const Blocked& theirs : view_.blocked(holder)) {
      const std::vector<int32_t> back = view_.holders(holder, *theirs.call);
      if (std::any_of(back.begin(), back.end(), [&](int32_t r) { return view_.is_blocked_in(r, *mine.call); }))
        found.push_back(&theirs);
    }
  }
  return found;
}

// Members of a group that wait in `call`.
std::vector<int32_t> Judge::waiting_in(const CallReport& call, uint64_t group) const {
  std::vector<int32_t> ranks;
  const GroupReport* members = view_.group(group);
  if (members == nullptr) return ranks;
  for (const int32_t rank : members->members) {
    if (view_.is_blocked_in(rank, call)) ranks.push_back(rank);
  }
  std::sort(ranks.begin(), ranks.end());
  return ranks;
}

std::optional<Verdict> Judge::find_stalled() const {
  if (!roots_.empty()) return {};  // somebody may still come
  const Blocked* longest = nullptr;
  for (const Blocked& blocked : arrived_) {
    // The last to come counts: before, there was nothing to transfer.
    int64_t together = blocked.for_ns;
    if (const GroupReport* group = view_.group(blocked.call->group)) {
      for (const int32_t member : group->members) {
        for (const Blocked& theirs : view_.blocked(member)) {
          if (theirs.call->group == blocked.call->group && theirs.call->sequence == blocked.call->sequence)
            together = std::min(together, theirs.call->begun_ago_ns);
        }
      }
    }
    if (together >= longest_patience() && (!longest || blocked.for_ns > longest->for_ns)) longest = &blocked;
  }
  if (!longest) return {};
  Verdict verdict{.cause = Cause::kAllArrived, .hosts = view_.silent_hosts()};
  set_call(verdict, *longest->call);
  verdict.message =
      "all ranks have arrived at " + call_text(verdict.call, verdict.group) +
      ", which does not end: " + waiting_text(verdict) +
      "Mend: suspect the network or a device between them. Run the same command again to go on from the last "
      "checkpoint.";
  return verdict;
}

}  // namespace

const char* name_of(Cause cause) {
  switch (cause) {
    case Cause::kNeverArrived:
      return "never_arrived";
    case Cause::kMismatch:
      return "mismatch";
    case Cause::kGone:
      return "gone";
    case Cause::kAllArrived:
      return "all_arrived";
    case Cause::kNone:
      break;
  }
  return "none";
}

Rules rules_for(std::span<const NodeReport> nodes) {
  constexpr int64_t kLeast = 30 * kSecond, kUnknown = 120 * kSecond, kLeastLong = 240 * kSecond;
  int64_t asked = 0, longest_step = 0;
  bool all_known = true;
  for (const NodeReport& node : nodes) {
    for (const RankReport& rank : node.ranks) {
      asked = std::max(asked, rank.hang_timeout_ns);
      longest_step = std::max(longest_step, rank.step_p99_ns);
      all_known = all_known && rank.step_p99_ns > 0;
    }
  }
  Rules rules;
  rules.timeout_ns = asked > 0 ? asked : std::max(all_known ? kLeast : kUnknown, 5 * longest_step);
  rules.long_timeout_ns = std::max(2 * rules.timeout_ns, kLeastLong);
  return rules;
}

Verdict judge(std::span<const NodeReport> nodes, const Rules& rules) {
  Verdict verdict = Judge(nodes, rules).judge();
  if (!verdict.hosts.empty()) return verdict;
  std::set<std::string> hosts;
  for (const NodeReport& node : nodes) {
    for (const RankReport& rank : node.ranks) {
      if (std::count(verdict.culprits.begin(), verdict.culprits.end(), rank.rank) > 0) hosts.insert(node.host);
    }
  }
  verdict.hosts.assign(hosts.begin(), hosts.end());
  return verdict;
}

}  // namespace lockstep::flight
