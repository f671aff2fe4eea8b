#include "waits.h"

#include <algorithm>
#include <limits>

namespace lockstep::flight {

WorldView::WorldView(std::span<const NodeReport> nodes, int64_t silent_ns) {
  for (const NodeReport& node : nodes) {
    const bool is_silent = node.heard_ago_ns > silent_ns;
    if (is_silent) silent_hosts_.push_back(node.host);
    for (const RankReport& rank : node.ranks) {
      hosts_[rank.rank] = node.host;
      for (const GroupReport& group : rank.groups) {
        if (!group.members.empty()) groups_.emplace(group.id, &group);
      }
      if (is_silent) continue;
      Known& known = reports_[rank.rank];
      known.report = &rank;
      known.idle_ns = rank.calls.empty() ? std::numeric_limits<int64_t>::max() : rank.calls[0].begun_ago_ns;
      for (const GroupReport& group : rank.groups) known.groups.emplace(group.id, &group);
      for (const CallReport& call : rank.calls) {
        known.idle_ns = std::min(known.idle_ns, call.is_done() ? call.done_ago_ns : call.begun_ago_ns);
        if (!call.is_done()) known.open[call.group].push_back(&call);
        for (const WaitReport& wait : rank.waits) {
          if (wait.ticket == call.ticket && !call.is_done()) known.blocked.push_back({&call, wait.for_ns});
        }
      }
      known_.push_back(rank.rank);
    }
  }
  std::sort(known_.begin(), known_.end());
}

const WorldView::Known* WorldView::known(int32_t rank) const {
  const auto found = reports_.find(rank);
  return found == reports_.end() ? nullptr : &found->second;
}

const RankReport* WorldView::find(int32_t rank) const {
  const Known* known = this->known(rank);
  return known ? known->report : nullptr;
}

std::string WorldView::host_of(int32_t rank) const {
  const auto found = hosts_.find(rank);
  return found == hosts_.end() ? std::string() : found->second;
}

const GroupReport* WorldView::group(uint64_t id) const {
  const auto found = groups_.find(id);
  return found == groups_.end() ? nullptr : found->second;
}

const std::vector<Blocked>& WorldView::blocked(int32_t rank) const {
  static const std::vector<Blocked> kNone;
  const Known* known = this->known(rank);
  return known ? known->blocked : kNone;
}

bool WorldView::has_begun(int32_t rank, const CallReport& call) const {
  const Known* known = this->known(rank);
  if (known == nullptr) return false;
  const auto found = known->groups.find(call.group);
  return found != known->groups.end() && found->second->begun >= call.sequence;
}

bool WorldView::is_done(int32_t rank, const CallReport& call) const {
  if (!has_begun(rank, call)) return false;
  const Known* known = this->known(rank);
  const auto open = known->open.find(call.group);
  if (open == known->open.end()) return true;
  return std::none_of(open->second.begin(), open->second.end(), [&](const CallReport* other) {
    return !is_message(other->call.op) && other->sequence == call.sequence;
  });
}

bool WorldView::is_blocked_in(int32_t rank, const CallReport& call) const {
  const auto& calls = blocked(rank);
  return std::any_of(calls.begin(), calls.end(), [&](const Blocked& blocked) {
    return blocked.call->group == call.group && blocked.call->sequence == call.sequence &&
           is_message(blocked.call->call.op) == is_message(call.call.op);
  });
}

bool WorldView::is_stuck(int32_t rank) const {
  const RankReport* report = find(rank);
  return report != nullptr && (report->liveness == Liveness::kStopped || report->liveness == Liveness::kGone ||
                               report->exit_kind != 0 || report->state == State::kEnded);
}

int64_t WorldView::idle_ns(int32_t rank) const {
  const Known* known = this->known(rank);
  return known ? known->idle_ns : 0;
}

std::vector<int32_t> WorldView::holders(int32_t rank, const CallReport& call) const {
  if (is_message(call.call.op)) return message_holders(rank, call);
  const GroupReport* group = this->group(call.group);
  if (group == nullptr) return {};
  // In this order: who has not come; who came and moves no more; of whom nothing is known; who came and waits
  // elsewhere.
  std::vector<int32_t> missing, still, unknown, elsewhere;
  for (const int32_t member : group->members) {
    if (member == rank) continue;
    if (find(member) == nullptr) {
      unknown.push_back(member);
    } else if (!has_begun(member, call)) {
      missing.push_back(member);
    } else if (is_done(member, call)) {
      continue;
    } else if (is_stuck(member) || is_idle(member)) {
      still.push_back(member);
    } else if (!is_blocked_in(member, call)) {
      elsewhere.push_back(member);
    }
  }
  for (auto* ranks : {&missing, &still, &unknown}) {
    if (!ranks->empty()) return *ranks;
  }
  return elsewhere;
}

// A send waits for its receive and the other way round. Which of several pair is not known: any one that is open does.
std::vector<int32_t> WorldView::message_holders(int32_t rank, const CallReport& call) const {
  const GroupReport* group = this->group(call.group);
  if (group == nullptr || call.call.root < 0 || static_cast<size_t>(call.call.root) >= group->members.size()) return {};
  const int32_t peer = group->members[static_cast<size_t>(call.call.root)];
  const Known* known = this->known(peer);
  if (known == nullptr || is_stuck(peer)) return {peer};
  const Op counterpart = call.call.op == Op::kSend ? Op::kReceive : Op::kSend;
  const auto open = known->open.find(call.group);
  if (open == known->open.end()) return {peer};
  const auto me = std::find(group->members.begin(), group->members.end(), rank) - group->members.begin();
  const bool is_there = std::any_of(open->second.begin(), open->second.end(), [&](const CallReport* other) {
    return other->call.op == counterpart && other->call.root == me;
  });
  return is_there ? std::vector<int32_t>{} : std::vector<int32_t>{peer};
}

}  // namespace lockstep::flight
