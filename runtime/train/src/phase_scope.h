#pragma once

#include <lockstep/collectives/process_group.h>
#include <lockstep/flight/ring.h>

namespace lockstep::train {

/// Tells the hang watchdog, while it lives, what this rank is busy with.
class PhaseScope {
 public:
  PhaseScope(const ProcessGroup& world, flight::Phase phase)
      : ring_(world.flight_ring()), before_(ring_ != nullptr ? ring_->phase() : phase) {
    if (ring_ != nullptr) ring_->set_phase(phase);
  }
  ~PhaseScope() {
    if (ring_ != nullptr) ring_->set_phase(before_);
  }
  PhaseScope(const PhaseScope&) = delete;
  PhaseScope& operator=(const PhaseScope&) = delete;

 private:
  flight::Ring* ring_;
  flight::Phase before_;
};

}  // namespace lockstep::train
