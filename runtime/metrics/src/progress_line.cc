#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include <unistd.h>

#include <lockstep/metrics/run_log.h>

namespace lockstep::metrics {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kRedraw{100};

std::string short_number(double value) {
  char text[32];
  if (value >= 1e6)
    std::snprintf(text, sizeof(text), "%.2fM", value / 1e6);
  else if (value >= 1e4)
    std::snprintf(text, sizeof(text), "%.1fk", value / 1e3);
  else
    std::snprintf(text, sizeof(text), "%.0f", value);
  return text;
}

std::string clock_time(double seconds) {
  char text[32];
  const auto s = static_cast<long long>(seconds);
  if (s >= 3600)
    std::snprintf(text, sizeof(text), "%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
  else
    std::snprintf(text, sizeof(text), "%lld:%02lld", s / 60, s % 60);
  return text;
}

// Under `lockstep run` a rank writes to a pipe, and the launcher says that a terminal is at its other end.
bool is_watched() { return isatty(STDERR_FILENO) == 1 || std::getenv("LOCKSTEP_STDERR_IS_TERMINAL") != nullptr; }

}  // namespace

class ProgressLine::Impl {
 public:
  Impl(int64_t total_steps, int64_t interval) : total_(total_steps), interval_(interval), terminal_(is_watched()) {}

  void step(int64_t step, double loss, double learning_rate, double grad_norm, double rate, const std::string& unit) {
    if (first_ < 0) first_ = step, start_ = Clock::now();
    const auto now = Clock::now();
    const bool last = step == total_;
    if (terminal_ ? (now - drawn_ < kRedraw && !last) : (!last && (interval_ <= 0 || step % interval_ != 0))) return;
    drawn_ = now;
    const double elapsed = std::chrono::duration<double>(now - start_).count();
    const double left =
        step > first_ ? elapsed / static_cast<double>(step - first_) * static_cast<double>(total_ - step) : NAN;
    char text[256];
    std::snprintf(text, sizeof(text), "step %lld/%lld  loss %.4f  lr %.2e  grad norm %.3f  %s %s/s  eta %s",
                  static_cast<long long>(step), static_cast<long long>(total_), loss, learning_rate, grad_norm,
                  short_number(rate).c_str(), unit.c_str(), std::isnan(left) ? "-" : clock_time(left).c_str());
    std::fprintf(stderr, terminal_ ? "\r\033[K%s" : "%s\n", text);
    open_ = terminal_;
  }

  void message(const std::string& text) {
    std::fprintf(stderr, open_ ? "\r\033[K%s\n" : "%s\n", text.c_str());
    open_ = false;
  }

  void finish() {
    if (open_) std::fputc('\n', stderr);
    open_ = false;
  }

 private:
  int64_t total_, interval_, first_ = -1;
  bool terminal_, open_ = false;
  Clock::time_point start_, drawn_{};
};

ProgressLine::ProgressLine(int64_t total_steps, int64_t log_interval_steps)
    : impl_(std::make_unique<Impl>(total_steps, log_interval_steps)) {}
ProgressLine::~ProgressLine() { impl_->finish(); }
void ProgressLine::step(int64_t step, double loss, double learning_rate, double grad_norm, double rate,
                        const std::string& rate_unit) {
  impl_->step(step, loss, learning_rate, grad_norm, rate, rate_unit);
}
void ProgressLine::message(const std::string& text) { impl_->message(text); }
void ProgressLine::finish() { impl_->finish(); }

}  // namespace lockstep::metrics
