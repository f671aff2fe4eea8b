#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "secure_channel.h"

namespace lockstep::launcher {

/// The supervisor's port: agents that know the token, each on a connection of its own.
///
/// Strangers get nothing but a nonce: 16 at once at most (the oldest makes way for one more, so that nobody can keep
/// agents out by holding on), 2 s each, and one line in the log for all of them. Threads: one. Never blocks.
class AgentServer {
 public:
  using Clock = SecureChannel::Clock;
  static constexpr size_t kMostStrangers = 16;

  /// Listens at a free port of `address` (IPv4, as digits; never that of all interfaces).
  /// @param most_agents at once; more are dropped. @throws IoError.
  AgentServer(const std::string& address, const Token& token, size_t most_agents);
  ~AgentServer();
  AgentServer(const AgentServer&) = delete;
  AgentServer& operator=(const AgentServer&) = delete;

  uint16_t port() const { return port_; }
  int fd() const { return poll_.get(); }  ///< readable: there is something to receive()

  struct Event {
    uint64_t agent = 0;  ///< number of the connection
    std::string body;    ///< empty: the connection is over
  };
  /// What has arrived from those that know the token. @param now for the deadlines.
  std::vector<Event> receive(Clock::time_point now);
  void send(uint64_t agent, const std::string& body, Clock::time_point now);
  void drop(uint64_t agent);

  int64_t strangers() const { return strangers_; }  ///< connections that were dropped without having proved anything
  size_t connections() const { return channels_.size(); }
  const std::string& first_stranger() const { return first_stranger_; }  ///< its address, and what it did

 private:
  struct Peer {
    std::unique_ptr<SecureChannel> channel;
    std::string address;
    bool waits_to_write = false;
  };
  void accept_all(Clock::time_point now);
  bool advance(uint64_t number, Peer& peer, Clock::time_point now, std::vector<Event>& events);
  void watch_writing(uint64_t number, Peer& peer);
  void count_stranger(const Peer& peer, const std::string& why);
  size_t unproved() const;

  const Token token_;
  const size_t most_agents_;
  UniqueFd listener_, poll_;
  uint16_t port_ = 0;
  std::map<uint64_t, Peer> channels_;  // oldest first
  uint64_t next_number_ = 1;
  int64_t strangers_ = 0;
  std::string first_stranger_;
};

}  // namespace lockstep::launcher
