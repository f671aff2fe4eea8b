#include "agent_server.h"

#include <algorithm>
#include <array>
#include <cerrno>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <lockstep/base/error.h>

#include "machine.h"

namespace lockstep::launcher {
namespace {

constexpr int kBacklog = 1024;  // the agents of a large job come all at once
constexpr size_t kMostAccepted = 256, kMostBodies = 64;

}  // namespace

AgentServer::AgentServer(const std::string& address, const Token& token, size_t most_agents)
    : token_(token), most_agents_(most_agents) {
  const auto check = [&](bool is_good) {
    if (!is_good) throw IoError("listening at", address, errno);
  };
  sockaddr_in where{};
  where.sin_family = AF_INET;
  errno = EADDRNOTAVAIL;
  check(::inet_pton(AF_INET, address.c_str(), &where.sin_addr) == 1 && where.sin_addr.s_addr != htonl(INADDR_ANY));
  listener_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  check(bool(listener_));
  check(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&where), sizeof(where)) == 0);
  check(::listen(listener_.get(), kBacklog) == 0);
  socklen_t size = sizeof(where);
  check(::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&where), &size) == 0);
  port_ = ntohs(where.sin_port);
  poll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  check(bool(poll_));
  epoll_event event{.events = EPOLLIN, .data = {.u64 = 0}};
  check(::epoll_ctl(poll_.get(), EPOLL_CTL_ADD, listener_.get(), &event) == 0);
}

AgentServer::~AgentServer() = default;

size_t AgentServer::unproved() const {
  return static_cast<size_t>(std::count_if(channels_.begin(), channels_.end(),
                                           [](const auto& peer) { return !peer.second.channel->is_open(); }));
}

void AgentServer::count_stranger(const Peer& peer, const std::string& why) {
  if (strangers_++ == 0) first_stranger_ = peer.address + ": " + why;
}

void AgentServer::accept_all(Clock::time_point now) {
  for (size_t i = 0; i < kMostAccepted; ++i) {
    sockaddr_in from{};
    socklen_t size = sizeof(from);
    UniqueFd fd(::accept4(listener_.get(), reinterpret_cast<sockaddr*>(&from), &size, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!fd) return;
    if (unproved() >= kMostStrangers) {
      const auto oldest = std::find_if(channels_.begin(), channels_.end(),
                                       [](const auto& peer) { return !peer.second.channel->is_open(); });
      count_stranger(oldest->second, "it says nothing, and others came");
      channels_.erase(oldest);
    }
    const int yes = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
    const uint64_t number = next_number_++;
    epoll_event event{.events = EPOLLIN, .data = {.u64 = number}};
    if (::epoll_ctl(poll_.get(), EPOLL_CTL_ADD, fd.get(), &event) != 0) continue;
    Peer& peer = channels_[number];
    peer.address = ipv4_text(from.sin_addr);
    peer.channel = std::make_unique<SecureChannel>(std::move(fd), token_, SecureChannel::Side::kServer, now);
    peer.channel->advance(now);
  }
}

void AgentServer::watch_writing(uint64_t number, Peer& peer) {
  const SecureChannel& channel = *peer.channel;
  if (channel.is_over() || channel.wants_to_write() == peer.waits_to_write) return;
  peer.waits_to_write = channel.wants_to_write();
  epoll_event event{.events = EPOLLIN, .data = {.u64 = number}};
  if (peer.waits_to_write) event.events |= EPOLLOUT;
  ::epoll_ctl(poll_.get(), EPOLL_CTL_MOD, channel.fd(), &event);
}

// @return whether it stays.
bool AgentServer::advance(uint64_t number, Peer& peer, Clock::time_point now, std::vector<Event>& events) {
  SecureChannel& channel = *peer.channel;
  const bool was_open = channel.is_open();
  channel.advance(now);
  for (size_t i = 0; i < kMostBodies; ++i) {  // then the others have their turn
    auto body = channel.next();
    if (!body) break;
    events.push_back({number, std::move(*body)});
    channel.advance(now);
  }
  if (!was_open && channel.is_open() && channels_.size() - unproved() > most_agents_) return false;
  if (channel.is_over()) {
    if (channel.is_stranger()) {
      count_stranger(peer, channel.why());
    } else {
      events.push_back({number, ""});
    }
    return false;
  }
  watch_writing(number, peer);
  return true;
}

std::vector<AgentServer::Event> AgentServer::receive(Clock::time_point now) {
  std::vector<Event> events;
  std::array<epoll_event, 64> ready{};
  const int count = ::epoll_wait(poll_.get(), ready.data(), static_cast<int>(ready.size()), 0);
  for (int i = 0; i < count; ++i) {
    const uint64_t number = ready[static_cast<size_t>(i)].data.u64;
    if (number == 0) {
      accept_all(now);
      continue;
    }
    const auto peer = channels_.find(number);
    if (peer != channels_.end() && !advance(number, peer->second, now, events)) channels_.erase(peer);
  }
  for (auto peer = channels_.begin(); peer != channels_.end();) {  // deadlines
    const bool is_due = !peer->second.channel->is_open() || peer->second.waits_to_write || count <= 0;
    if (is_due && !advance(peer->first, peer->second, now, events)) {
      peer = channels_.erase(peer);
    } else {
      ++peer;
    }
  }
  return events;
}

void AgentServer::send(uint64_t agent, const std::string& body, Clock::time_point now) {
  const auto peer = channels_.find(agent);
  if (peer == channels_.end()) return;
  peer->second.channel->send(body, now);
  watch_writing(agent, peer->second);
}

void AgentServer::drop(uint64_t agent) { channels_.erase(agent); }

}  // namespace lockstep::launcher
