#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "agent_server.h"
#include "hosts.h"
#include "job.h"
#include "node_watch.h"

namespace lockstep::launcher {

/// The supervisor's side of the hang watchdog of one start on several hosts: the agents' port, the verdict over all
/// nodes (node_watch.h), its record in the run directory, and the word to end the job.
///
/// Threads: one.
class ClusterWatch : public JobWatch {
 public:
  /// Listens where the placement's hosts reach this one, and leaves address and token in `launch_folder` for the
  /// agents.
  /// @return nullptr where all of it is on this machine (its one agent sees everything) or there is no such place:
  /// agents then decide alone, and a line says so.
  static std::unique_ptr<ClusterWatch> start(const Placement& placement, const std::string& launch_folder,
                                             const std::string& run_dir);

  int fd() const override { return server_->fd(); }
  Advice look() override;

  /// The job is over: tells the agents so, and hears them out for a moment if a rank has died or a host is lost.
  void finish(const JobEnd& end);
  /// Why this watch ended the job.
  const std::optional<ClusterFinding>& finding() const { return watch_.finding(); }
  /// Who died, where mpirun ended the job because of it. After finish().
  const std::optional<ClusterFinding>& death() const { return death_; }
  /// Which hosts do not answer, where mpirun ended the job because of one. After finish().
  const std::optional<ClusterFinding>& loss() const { return loss_; }

 private:
  using Clock = SecureChannel::Clock;
  ClusterWatch(const Placement& placement, std::unique_ptr<AgentServer> server, std::string run_dir);
  void receive(Clock::time_point now);
  void take(uint64_t agent, const std::string& body, Clock::time_point now);
  void send(const std::vector<std::pair<size_t, Ask>>& asks, Clock::time_point now);
  template <typename Condition>
  void receive_while(std::chrono::milliseconds limit, Condition condition);
  void tell_over(Clock::time_point now);
  void tell_of_strangers();

  std::unique_ptr<AgentServer> server_;
  NodeWatch watch_;
  const std::string run_dir_;
  std::map<uint64_t, size_t> node_of_agent_;
  std::map<size_t, uint64_t> agent_of_node_;
  bool is_over_ = false, has_told_of_strangers_ = false;
  std::optional<ClusterFinding> death_, loss_;
};

}  // namespace lockstep::launcher
