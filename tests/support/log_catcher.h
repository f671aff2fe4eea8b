#pragma once

#include <mutex>
#include <string>

#include <lockstep/base/log.h>

namespace lockstep::test {

/// What is logged at one severity while it lives, from any thread, a line each.
class LogCatcher : public google::LogSink {
 public:
  explicit LogCatcher(google::LogSeverity severity) : severity_(severity) { google::AddLogSink(this); }
  LogCatcher(const LogCatcher&) = delete;
  LogCatcher& operator=(const LogCatcher&) = delete;
  ~LogCatcher() override { google::RemoveLogSink(this); }

  void send(google::LogSeverity severity, const char*, const char*, int, const google::LogMessageTime&,
            const char* message, size_t length) override {
    const std::lock_guard lock(mutex_);
    if (severity == severity_) text_ += std::string(message, length) + "\n";
  }
  std::string text() const {
    const std::lock_guard lock(mutex_);
    return text_;
  }

 private:
  google::LogSeverity severity_;
  mutable std::mutex mutex_;
  std::string text_;
};

}  // namespace lockstep::test
