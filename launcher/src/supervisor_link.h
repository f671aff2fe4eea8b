#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>

#include <poll.h>

#include "agent_messages.h"
#include "secure_channel.h"

namespace lockstep::launcher {

/// An agent's connection to its supervisor, made anew when it breaks. Threads: one. Never blocks.
class SupervisorLink {
 public:
  using Clock = SecureChannel::Clock;
  static constexpr std::chrono::milliseconds kAnswers{2'000};  ///< a supervisor that is there does within this time
  static constexpr std::chrono::milliseconds kTriesAgain{1'000};

  /// @param launch_folder LOCKSTEP_LAUNCH_DIR. A supervisor leaves its address there before it starts ranks; where
  /// there is none at the first look, this stays unconnected.
  explicit SupervisorLink(std::string launch_folder) : launch_folder_(std::move(launch_folder)) {}

  void advance(Clock::time_point now);
  /// Whether the supervisor hears and answers, and so decides.
  bool is_up(Clock::time_point now) const { return is_open() && now - heard_ < kAnswers; }
  bool is_open() const { return channel_ && channel_->is_open(); }
  bool is_job_over() const { return is_job_over_; }  ///< the supervisor said so
  std::optional<Ask> next_ask();
  void send(const FromAgent& message, Clock::time_point now);
  /// For the last words: until all is sent, or the time is over.
  void flush(std::chrono::milliseconds limit);
  pollfd polled() const;  ///< fd -1: nothing to wait for

 private:
  void connect(Clock::time_point now);

  const std::string launch_folder_;
  std::optional<Rendezvous> rendezvous_;
  std::unique_ptr<SecureChannel> channel_;
  Clock::time_point tried_{}, heard_{};
  bool has_looked_ = false, was_open_ = false, is_job_over_ = false;
  std::deque<Ask> asks_;
};

}  // namespace lockstep::launcher
