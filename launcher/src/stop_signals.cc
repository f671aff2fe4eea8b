#include "stop_signals.h"

#include <algorithm>
#include <csignal>

#include <poll.h>

namespace lockstep::launcher {
namespace {

volatile std::sig_atomic_t g_requests = 0, g_is_urgent = 0;  // what signal handlers may touch

void note_signal(int signal) {
  if (g_requests > 0 && signal == SIGINT) g_is_urgent = 1;
  g_requests = g_requests + 1;
}

}  // namespace

void install_stop_signals() {
  struct sigaction action {};
  action.sa_handler = &note_signal;
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaction(signal, &action, nullptr);
  action.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &action, nullptr);
}

int stop_requests() { return g_requests; }
bool stop_is_urgent() { return g_is_urgent != 0; }

bool wait_unless_stopped(std::chrono::milliseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (stop_requests() == 0) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - std::chrono::steady_clock::now());
    if (left.count() <= 0) return true;
    ::poll(nullptr, 0, static_cast<int>(std::min<int64_t>(left.count(), 50)));  // a signal ends it, or just missed it
  }
  return false;
}

}  // namespace lockstep::launcher
