#include "cluster_watch.h"

#include <algorithm>
#include <iostream>

#include <poll.h>
#include <sys/resource.h>

#include <lockstep/base/error.h>

#include "hang_record.h"
#include "open_mpi.h"

namespace lockstep::launcher {
namespace {

using std::chrono::milliseconds;

constexpr size_t kOwnDescriptors = 128;
constexpr milliseconds kLastWords{400};    // of agents whose ranks are being ended
constexpr milliseconds kSlowWords{2'000};  // of all but one

std::vector<NodeWatch::Node> nodes_of(const Placement& placement) {
  std::vector<NodeWatch::Node> nodes;
  int32_t rank = 0;
  for (const Host& host : placement.hosts) {
    NodeWatch::Node node{host.name, {}};
    for (int64_t i = 0; i < host.slots; ++i) node.ranks.push_back(rank++);
    nodes.push_back(std::move(node));
  }
  return nodes;
}

std::string address_for(const Placement& placement) {
  for (const Host& host : placement.hosts) {
    if (is_this_machine(host.name)) continue;
    if (std::string address = own_address_to(host.name); !address.empty()) return address;
  }
  return "";
}

// Only where there are not enough: what is started from here inherits it.
void allow_descriptors(rlim_t wanted) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = std::min(wanted, limit.rlim_max);
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

std::unique_ptr<ClusterWatch> ClusterWatch::start(const Placement& placement, const std::string& launch_folder,
                                                  const std::string& run_dir) {
  const auto is_here = [](const Host& host) { return is_this_machine(host.name); };
  if (std::all_of(placement.hosts.begin(), placement.hosts.end(), is_here)) return nullptr;
  const std::string address = address_for(placement);
  const size_t most_agents = 2 * placement.hosts.size();  // while one comes back the old connection may still be there
  allow_descriptors(most_agents + AgentServer::kMostStrangers + kOwnDescriptors);
  try {
    if (address.empty())
      throw IoError("finding the address of this host for", placement.hosts.back().name, EADDRNOTAVAIL);
    const Token token = Token::random();
    auto server = std::make_unique<AgentServer>(address, token, most_agents);
    write_rendezvous(launch_folder, {address, server->port(), token});
    return std::unique_ptr<ClusterWatch>(new ClusterWatch(placement, std::move(server), run_dir));
  } catch (const IoError& error) {
    std::cerr << "lockstep: " << error.what() << "; each host's hang watchdog decides alone" << std::endl;
    return nullptr;
  }
}

ClusterWatch::ClusterWatch(const Placement& placement, std::unique_ptr<AgentServer> server, std::string run_dir)
    : server_(std::move(server)), watch_(nodes_of(placement), Clock::now()), run_dir_(std::move(run_dir)) {}

JobWatch::Advice ClusterWatch::look() {
  const auto now = Clock::now();
  receive(now);
  send(watch_.look(now), now);
  const auto& finding = watch_.finding();
  if (!finding) {
    if (const std::string text = watch_.stragglers(now); !text.empty()) std::cerr << "lockstep: " << text << std::endl;
    return Advice::kGoOn;
  }
  if (!is_over_) {
    tell_over(now);
    std::cerr << "lockstep: " << finding->verdict.message << std::endl;
    write_hang_record(run_dir_, own_name(), finding->verdict, finding->nodes);
  }
  return finding->cause == Cause::kLostHost ? Advice::kEndWithoutHosts : Advice::kEnd;
}

void ClusterWatch::receive(Clock::time_point now) {
  for (const AgentServer::Event& event : server_->receive(now)) {
    if (!event.body.empty()) {
      take(event.agent, event.body, now);
      continue;
    }
    const auto known = node_of_agent_.find(event.agent);  // the watch hears nothing of that node from now on
    if (known == node_of_agent_.end()) continue;
    const auto speaks = agent_of_node_.find(known->second);
    if (speaks != agent_of_node_.end() && speaks->second == event.agent) agent_of_node_.erase(speaks);
    node_of_agent_.erase(known);
  }
  tell_of_strangers();
}

void ClusterWatch::take(uint64_t agent, const std::string& body, Clock::time_point now) {
  try {
    FromAgent message = decode_from_agent(body);
    if (const auto* heartbeat = std::get_if<Heartbeat>(&message)) {
      const auto node = watch_.node_of(*heartbeat);
      if (!node) throw CorruptData("an agent of a host that has no ranks: " + heartbeat->host);
      const auto before = agent_of_node_.find(*node);
      if (before != agent_of_node_.end() && before->second != agent) {  // it has come back
        server_->drop(before->second);
        node_of_agent_.erase(before->second);
      }
      node_of_agent_[agent] = *node;
      agent_of_node_[*node] = agent;
      watch_.heard(*node, *heartbeat, now);
      server_->send(agent, encode(FromSupervisor(Heard{})), now);
      return;
    }
    const auto node = node_of_agent_.find(agent);
    if (node == node_of_agent_.end()) throw CorruptData("a report of nobody");
    if (auto* report = std::get_if<Report>(&message)) {
      watch_.reported(node->second, std::move(*report), now);
    } else {
      watch_.ended(node->second, now);
    }
  } catch (const CorruptData& error) {  // of another version, at most: it knows the token
    std::cerr << "lockstep: " << error.what() << "; its connection is dropped" << std::endl;
    server_->drop(agent);
    node_of_agent_.erase(agent);
  }
}

void ClusterWatch::send(const std::vector<std::pair<size_t, Ask>>& asks, Clock::time_point now) {
  for (const auto& [node, ask] : asks) {
    const auto agent = agent_of_node_.find(node);
    if (agent != agent_of_node_.end()) server_->send(agent->second, encode(FromSupervisor(ask)), now);
  }
}

void ClusterWatch::tell_over(Clock::time_point now) {
  is_over_ = true;
  for (const auto& [node, agent] : agent_of_node_) server_->send(agent, encode(FromSupervisor(JobOver{})), now);
}

void ClusterWatch::tell_of_strangers() {
  if (server_->strangers() == 0 || has_told_of_strangers_) return;
  has_told_of_strangers_ = true;
  std::cerr << "lockstep: somebody who does not know this job's token tried the agents' port ("
            << server_->first_stranger() << "); more of that is not told" << std::endl;
}

template <typename Condition>
void ClusterWatch::receive_while(milliseconds limit, Condition condition) {
  const auto end = Clock::now() + limit;
  while (Clock::now() < end && condition()) {
    pollfd ready{server_->fd(), POLLIN, 0};
    ::poll(&ready, 1, 20);
    receive(Clock::now());
  }
}

void ClusterWatch::finish(const JobEnd& end) {
  if (is_over_) return;
  receive(Clock::now());
  const std::optional<int> rank = end.scan.dead_rank();
  if (end.scan.lost_host()) {  // the ranks of the other hosts are being ended
    send(watch_.ask(Clock::now()), Clock::now());
    receive_while(kLastWords, [&] { return !watch_.have_answered(); });
    receive_while(kSlowWords, [&] { return watch_.unanswered().size() > 1; });  // a busy machine is slow to answer
    loss_ = watch_.loss(Clock::now());
  }
  const bool ended_by_us = end.was_asked || end.was_ended_by_us;  // that is no death to tell of
  if (!loss_ && !ended_by_us && watch_.death(rank)) {
    receive_while(kLastWords, [&] { return !agent_of_node_.empty(); });
    death_ = watch_.death(rank);
  }
  tell_over(Clock::now());
  if (const auto& found = death_ ? death_ : loss_)
    write_hang_record(run_dir_, own_name(), found->verdict, found->nodes);
}

}  // namespace lockstep::launcher
