#include "supervisor_link.h"

#include <cerrno>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <lockstep/base/error.h>

namespace lockstep::launcher {
namespace {

constexpr size_t kMostAsks = 8;  // the newest count

}  // namespace

void SupervisorLink::connect(Clock::time_point now) {
  if (!has_looked_) rendezvous_ = read_rendezvous(launch_folder_);
  has_looked_ = true;
  if (!rendezvous_ || (tried_ != Clock::time_point() && now - tried_ < kTriesAgain)) return;
  tried_ = now;
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  sockaddr_in where{};
  where.sin_family = AF_INET;
  where.sin_port = htons(rendezvous_->port);
  ::inet_pton(AF_INET, rendezvous_->address.c_str(), &where.sin_addr);
  if (!fd || (::connect(fd.get(), reinterpret_cast<sockaddr*>(&where), sizeof(where)) != 0 && errno != EINPROGRESS))
    return;
  const int yes = 1;
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
  channel_ = std::make_unique<SecureChannel>(std::move(fd), rendezvous_->token, SecureChannel::Side::kClient, now);
  was_open_ = false;
}

void SupervisorLink::advance(Clock::time_point now) {
  if (is_job_over_) return;
  if (!channel_) connect(now);
  if (!channel_) return;
  channel_->advance(now);
  if (!was_open_ && channel_->is_open()) {
    was_open_ = true;
    heard_ = now;
  }
  try {
    while (const auto body = channel_->next()) {
      heard_ = now;
      const FromSupervisor message = decode_from_supervisor(*body);
      if (const auto* ask = std::get_if<Ask>(&message)) asks_.push_back(*ask);
      if (asks_.size() > kMostAsks) asks_.pop_front();
      is_job_over_ |= std::holds_alternative<JobOver>(message);
      channel_->advance(now);
    }
  } catch (const CorruptData&) {  // of another version
    channel_.reset();
    return;
  }
  // After a cut the old connection waits for its retransmissions, longer and longer.
  if (channel_->is_over() || (was_open_ && now - heard_ > 2 * kAnswers)) channel_.reset();
}

std::optional<Ask> SupervisorLink::next_ask() {
  if (asks_.empty()) return std::nullopt;
  const Ask ask = asks_.front();
  asks_.pop_front();
  return ask;
}

void SupervisorLink::send(const FromAgent& message, Clock::time_point now) {
  if (is_open()) channel_->send(encode(message), now);
}

void SupervisorLink::flush(std::chrono::milliseconds limit) {
  const auto end = Clock::now() + limit;
  while (is_open() && channel_->wants_to_write() && Clock::now() < end) {
    pollfd ready = polled();
    ::poll(&ready, 1, 20);
    advance(Clock::now());
  }
}

pollfd SupervisorLink::polled() const {
  if (!channel_ || channel_->is_over()) return {-1, 0, 0};
  return {channel_->fd(), static_cast<short>(POLLIN | (channel_->wants_to_write() ? POLLOUT : 0)), 0};
}

}  // namespace lockstep::launcher
