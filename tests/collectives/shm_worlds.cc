// Ranks as processes that share memory: mpirun decides how many.
#include <cstdio>
#include <exception>

#include <mpi.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/shm_group.h>

#include "worlds.h"

namespace lockstep {

std::vector<World> worlds() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return {{.name = "shm", .size = size, .is_checked = true}};
}

void run_ranks(const World& world, const std::function<void(ProcessGroup&)>& body) {
  try {
    configure_arithmetic(1);
    const auto group = make_shm_group(make_mpi_world());
    body(*group);
    group->close();
  } catch (...) {
    const Failure failure = describe_current_exception();
    std::fprintf(stderr, "[  FAILED  ] %s: %s\n", world.name.c_str(), failure.message.c_str());
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(failure.code));  // the others wait for this rank
  }
}

}  // namespace lockstep
