#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <lockstep/flight/verdict.h>

namespace lockstep::flight {

/// Ranks that run through lists of blocking calls on a made-up clock, and what their rings would say at any moment.
class SimulatedWorld {
 public:
  struct Step {
    uint64_t group = 1;
    Call call;
    double delay_s = 0;  ///< of computing, before it
    std::string label;
  };

  explicit SimulatedWorld(int size, int ranks_a_node = 8) : ranks_(size), ranks_a_node_(ranks_a_node) {
    std::vector<int32_t> all(size);
    for (int i = 0; i < size; ++i) all[i] = i;
    add_group("world", all);
  }

  uint64_t add_group(const std::string& name, std::vector<int32_t> members) {
    groups_.push_back({.id = groups_.size() + 1, .name = name, .members = std::move(members)});
    return groups_.back().id;
  }

  std::vector<Step>& program(int rank) { return ranks_[rank].program; }
  void stop(int rank) { ranks_[rank].liveness = Liveness::kStopped; }
  void kill(int rank) { ranks_[rank].liveness = Liveness::kGone; }
  void sleep(int rank) { ranks_[rank].busy_until = 1e9; }
  void set_phase(int rank, Phase phase) { ranks_[rank].phase = phase; }
  double now() const { return now_; }
  bool is_finished(int rank) const {
    return ranks_[rank].at == ranks_[rank].program.size() && !ranks_[rank].is_waiting;
  }

  /// Goes on for `seconds`, in ticks of 50 ms; `look` is called at each.
  template <typename Look>
  void run(double seconds, const Look& look) {
    for (const double end = now_ + seconds; now_ < end; now_ += 0.05) {
      for (size_t r = 0; r < ranks_.size(); ++r) advance(static_cast<int>(r));
      complete();
      look();
    }
  }
  void run(double seconds) {
    run(seconds, [] {});
  }

  /// One report a node; nodes in `without` have none.
  std::vector<NodeReport> reports(const std::vector<int>& without = {}) const {
    std::vector<NodeReport> nodes;
    for (int first = 0; first < static_cast<int>(ranks_.size()); first += ranks_a_node_) {
      const int number = first / ranks_a_node_;
      if (std::count(without.begin(), without.end(), number) > 0) continue;
      NodeReport node{.host = "n" + std::to_string(number)};
      for (int r = first; r < std::min<int>(first + ranks_a_node_, static_cast<int>(ranks_.size())); ++r)
        node.ranks.push_back(report(r));
      nodes.push_back(std::move(node));
    }
    return nodes;
  }

 private:
  struct Made {
    uint64_t group, sequence, fingerprint;
    Call call;
    std::string label;
    double begun, done = -1;
  };
  struct Rank {
    std::vector<Step> program;
    size_t at = 0;
    double busy_until = -1;
    bool is_waiting = false, has_slept = false;
    Liveness liveness = Liveness::kRunning;
    Phase phase = Phase::kTraining;
    std::vector<Made> made;
    std::map<uint64_t, uint64_t> sequences, messages, fingerprints;
  };

  bool moves(const Rank& rank) const { return rank.liveness != Liveness::kStopped && rank.liveness != Liveness::kGone; }

  void advance(int r) {
    Rank& rank = ranks_[r];
    if (!moves(rank) || rank.is_waiting || rank.at == rank.program.size()) return;
    const Step& step = rank.program[rank.at];
    if (rank.busy_until < 0) rank.busy_until = now_ + step.delay_s;
    if (now_ < rank.busy_until) return;
    rank.busy_until = -1;
    ++rank.at;
    rank.is_waiting = true;
    const bool is_message = flight::is_message(step.call.op);
    if (!is_message) {
      auto [fingerprint, is_new] = rank.fingerprints.emplace(step.group, step.group);
      fingerprint->second = fingerprint_after(fingerprint->second, step.call);
    }
    rank.made.push_back({step.group, is_message ? ++rank.messages[step.group] : ++rank.sequences[step.group],
                         rank.fingerprints[step.group], step.call, step.label, now_});
  }

  void complete() {
    for (size_t r = 0; r < ranks_.size(); ++r) {
      if (!ranks_[r].is_waiting || !moves(ranks_[r])) continue;
      if (has_arrived(static_cast<int>(r), ranks_[r].made.back())) finish(ranks_[r]);
    }
  }

  void finish(Rank& rank) {
    rank.made.back().done = now_;
    rank.is_waiting = false;
  }

  bool has_arrived(int me, const Made& call) const {
    const auto& members = groups_[call.group - 1].members;
    if (flight::is_message(call.call.op)) {
      const int32_t peer = members[call.call.root];
      const auto mine = std::find(members.begin(), members.end(), me) - members.begin();
      uint64_t theirs = 0, ours = 0;
      const Op other = call.call.op == Op::kSend ? Op::kReceive : Op::kSend;
      for (const Made& made : ranks_[peer].made)
        theirs += made.group == call.group && made.call.op == other && made.call.root == mine;
      for (const Made& made : ranks_[me].made)
        ours += made.group == call.group && made.call.op == call.call.op && made.call.root == call.call.root;
      return theirs >= ours;
    }
    return std::all_of(members.begin(), members.end(), [&](int32_t member) {
      const auto found = ranks_[member].sequences.find(call.group);
      return found != ranks_[member].sequences.end() && found->second >= call.sequence;
    });
  }

  int64_t ago(double then) const { return static_cast<int64_t>((now_ - then) * 1e9); }

  RankReport report(int r) const {
    const Rank& rank = ranks_[r];
    RankReport report;
    report.rank = r;
    report.world_size = static_cast<int32_t>(ranks_.size());
    report.pid = 1000 + r;
    report.liveness = rank.liveness;
    report.state = State::kRunning;
    report.phase = rank.phase;
    report.step = 7;
    for (const GroupReport& group : groups_) {
      if (std::count(group.members.begin(), group.members.end(), r) == 0) continue;
      GroupReport mine = group;
      const auto value = [&](const auto& map) { return map.count(group.id) ? map.at(group.id) : 0; };
      mine.begun = value(rank.sequences);
      mine.messages = value(rank.messages);
      mine.fingerprint = value(rank.fingerprints);
      report.groups.push_back(std::move(mine));
    }
    for (size_t i = 0; i < rank.made.size(); ++i) {
      const Made& made = rank.made[i];
      report.calls.push_back({i, made.group, made.sequence, made.call, made.fingerprint, -1, made.label,
                              ago(made.begun), made.done < 0 ? -1 : ago(made.done)});
    }
    if (rank.is_waiting) report.waits.push_back({rank.made.size() - 1, ago(rank.made.back().begun)});
    return report;
  }

  double now_ = 0;
  std::vector<Rank> ranks_;
  std::vector<GroupReport> groups_;
  int ranks_a_node_;
};

}  // namespace lockstep::flight
