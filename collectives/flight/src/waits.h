#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include <lockstep/flight/report.h>

namespace lockstep::flight {

/// A call that a rank is blocked in.
struct Blocked {
  const CallReport* call = nullptr;
  int64_t for_ns = 0;
};

/// The reports of all nodes as one world, indexed by rank.
class WorldView {
 public:
  WorldView(std::span<const NodeReport> nodes, int64_t silent_ns);

  const std::vector<int32_t>& ranks() const { return known_; }  ///< those with a report, ascending
  const RankReport* find(int32_t rank) const;                   ///< nullptr: no report, or an old one
  std::string host_of(int32_t rank) const;                      ///< also of a silent node; empty: not known
  const std::vector<std::string>& silent_hosts() const { return silent_hosts_; }
  const GroupReport* group(uint64_t id) const;
  const std::vector<Blocked>& blocked(int32_t rank) const;
  bool has_begun(int32_t rank, const CallReport& call) const;
  bool is_done(int32_t rank, const CallReport& call) const;
  bool is_blocked_in(int32_t rank, const CallReport& call) const;
  /// Stopped, gone or ended: it will not move, whatever the others do.
  bool is_stuck(int32_t rank) const;
  bool is_idle(int32_t rank) const { return blocked(rank).empty(); }
  /// Since it began or finished anything.
  int64_t idle_ns(int32_t rank) const;

  /// Whom `rank` waits for in `call`. Empty: all are there.
  std::vector<int32_t> holders(int32_t rank, const CallReport& call) const;

 private:
  struct Known {
    const RankReport* report = nullptr;
    std::unordered_map<uint64_t, const GroupReport*> groups;
    std::unordered_map<uint64_t, std::vector<const CallReport*>> open;  // by group: calls begun and not done
    std::vector<Blocked> blocked;
    int64_t idle_ns = 0;
  };

  const Known* known(int32_t rank) const;
  std::vector<int32_t> message_holders(int32_t rank, const CallReport& call) const;

  std::unordered_map<int32_t, Known> reports_;
  std::unordered_map<int32_t, std::string> hosts_;
  std::unordered_map<uint64_t, const GroupReport*> groups_;
  std::vector<int32_t> known_;
  std::vector<std::string> silent_hosts_;
};

}  // namespace lockstep::flight
