#pragma once

#include <memory>

#include <lockstep/base/rank_info.h>
#include <lockstep/collectives/runtime.h>
#include <lockstep/flight/ring.h>

namespace lockstep {

/// What makes a rank visible to the hang watchdog: its ring, a thread that answers for it, and on local rank 0 the
/// node's agent, a process that outlives the ranks by a second at most.
class FlightRecorder {
 public:
  /// Before MPI starts, so that a rank that hangs there is seen. nullptr where nobody could wait for anybody (one rank)
  /// or nothing can be recorded, which is a warning: training goes on unwatched.
  /// Installs a SIGUSR2 handler (stack of the main thread into the ring) and handlers of SIGSEGV, SIGBUS, SIGFPE,
  /// SIGILL and SIGABRT that note the signal and pass it on to the handlers before them: to be called after those are
  /// set.
  static std::unique_ptr<FlightRecorder> start(const RankInfo& info, const RuntimeOptions& options);
  ~FlightRecorder();
  FlightRecorder(const FlightRecorder&) = delete;
  FlightRecorder& operator=(const FlightRecorder&) = delete;

  /// The world is up: from here on its calls are noted, and those of the groups split off it.
  std::unique_ptr<ProcessGroup> watch(std::unique_ptr<ProcessGroup> world);
  /// How this rank ends.
  void note_end(int code, const std::string& message) noexcept { ring_->set_exit(code, message); }

 private:
  class Answerer;  // the thread
  FlightRecorder(std::shared_ptr<flight::Ring> ring, int agent);

  std::shared_ptr<flight::Ring> ring_;
  std::unique_ptr<flight::Ring::Group> world_;  // until watch()
  uint64_t start_;                              // the ticket of what this rank is in until then
  std::unique_ptr<Answerer> answerer_;
};

}  // namespace lockstep
