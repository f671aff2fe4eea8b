#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <lockstep/flight/verdict.h>

#include "agent_messages.h"
#include "restart_policy.h"

namespace lockstep::launcher {

/// Why a job has to end, or ended, as seen by the agents of all its nodes.
struct ClusterFinding {
  int exit_code = 0;  ///< 76: it hangs; 75: a host is lost, or a rank died
  Cause cause = Cause::kThrown;
  flight::Verdict verdict;                ///< its message is what people read
  std::vector<flight::NodeReport> nodes;  ///< that it was judged by
  std::vector<std::string> lost_hosts;    ///< by the names of the placement
  std::optional<int64_t> step;            ///< of the first culprit
  bool is_out_of_memory = false;          ///< the kernel of the culprit's host ended processes for want of memory
};

/// What a supervisor makes of what the agents of all nodes tell it: which rank hangs, which host is lost.
///
/// Nodes report by themselves when a rank has waited for half the timeout or has died; then all are asked, and what
/// they know at that moment is judged together (flight::judge). A node that says nothing for the timeout is lost,
/// unless the others train on: then only its agent is gone. A supervisor that was stopped itself, and a job all of
/// whose ranks were, have lost time, not nodes.
///
/// Pure: no clock and no input or output of its own, so that tests drive it. Threads: one.
class NodeWatch {
 public:
  using Clock = std::chrono::steady_clock;
  struct Node {
    std::string host;
    std::vector<int32_t> ranks;
  };

  NodeWatch(std::vector<Node> nodes, Clock::time_point now);

  /// Which node an agent speaks for: by its host's name, else by its ranks.
  std::optional<size_t> node_of(const Heartbeat& heartbeat) const;

  void heard(size_t node, const Heartbeat& heartbeat, Clock::time_point now);
  void reported(size_t node, Report report, Clock::time_point now);
  void ended(size_t node, Clock::time_point now);  ///< its ranks are gone, and it says so

  /// What to ask of which nodes now. To be called ten times a second, and after each message.
  std::vector<std::pair<size_t, Ask>> look(Clock::time_point now);
  /// Set once; nothing changes any more then.
  const std::optional<ClusterFinding>& finding() const { return finding_; }
  /// Who computes longer than the median of all nodes' ranks, in words; empty: nobody, or it was told a minute ago.
  std::string stragglers(Clock::time_point now);
  /// A rank that died, if one did and none said why: for the record, as mpirun ends the job then.
  /// @param rank that mpirun names, if it does: agents of several hosts cannot know which of two died first.
  std::optional<ClusterFinding> death(std::optional<int32_t> rank) const;
  /// Asks all nodes once more, where mpirun has ended the job because a host is lost; those that are unanswered() when
  /// the caller's patience is over are.
  std::vector<std::pair<size_t, Ask>> ask(Clock::time_point now);
  bool have_answered() const;  ///< but those that had been silent before
  std::vector<size_t> unanswered() const;
  std::optional<ClusterFinding> loss(Clock::time_point now) const;

 private:
  struct State {
    Node place;
    bool was_heard = false, has_ended = false;
    Clock::time_point heard{}, moved{}, reported{};
    int64_t timeout_ms = 0, step = -1, out_of_memory_kills = 0;
    uint32_t answered = 0;  // the last ask that it answered
    std::vector<RankTime> times;
    std::optional<flight::NodeReport> report;
  };
  enum class Phase { kCalm, kAsked, kAskedForStacks };

  std::chrono::milliseconds timeout() const;
  bool owes_answer(const State& node) const;
  bool is_silent(const State& node, std::chrono::milliseconds limit, Clock::time_point now) const;
  void forgive_pause(Clock::time_point now);
  bool find_lost(Clock::time_point now);
  bool is_suspicious(Clock::time_point now) const;
  std::vector<std::pair<size_t, Ask>> decide(Clock::time_point now);
  std::vector<std::pair<size_t, Ask>> ask_for_stacks(Clock::time_point now);
  void conclude();
  /// What the nodes said that answered the last ask; the others are silent.
  std::vector<flight::NodeReport> view(Clock::time_point now) const;
  ClusterFinding loss_of(const std::vector<const State*>& lost, Clock::time_point now) const;
  flight::NodeReport placeholder(const State& node, Clock::time_point now) const;
  ClusterFinding finding_of(flight::Verdict verdict, std::vector<flight::NodeReport> nodes, int exit_code) const;

  std::vector<State> nodes_;
  Phase phase_ = Phase::kCalm;
  uint32_t asked_ = 0;
  std::vector<size_t> asked_nodes_;
  Clock::time_point deadline_{}, quiet_until_{}, looked_, patient_until_{}, undecided_since_{}, stragglers_next_{};
  bool is_called_ = false;          // a report said what needs a look at all nodes
  bool has_seen_mismatch_ = false;  // once; some may not have come to that call yet
  bool has_spoken_ = false;         // a rank that ended said why itself
  std::vector<int32_t> first_dead_;
  flight::Verdict first_;
  std::vector<flight::NodeReport> first_view_;
  std::optional<std::pair<flight::Verdict, std::vector<flight::NodeReport>>> death_;
  std::optional<ClusterFinding> finding_;
};

}  // namespace lockstep::launcher
