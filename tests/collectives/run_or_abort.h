#pragma once

#include <cstdio>
#include <functional>

#include <mpi.h>

#include <lockstep/base/error.h>

#include "worlds.h"

namespace lockstep {

/// Runs `body` on this rank of an mpirun. An exception ends the job: the others wait for this rank.
inline void run_or_abort(const World& world, const std::function<void()>& body) {
  try {
    body();
  } catch (...) {
    const Failure failure = describe_current_exception();
    std::fprintf(stderr, "[  FAILED  ] %s: %s\n", world.name.c_str(), failure.message.c_str());
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(failure.code));
  }
}

}  // namespace lockstep
