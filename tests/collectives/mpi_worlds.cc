// Ranks as processes: mpirun decides how many. Each world is a copy of MPI_COMM_WORLD.
#include <cstdio>
#include <exception>

#include <mpi.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/mpi_group.h>

#include "worlds.h"

namespace lockstep {

std::vector<World> worlds() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return {{.name = "mpi", .size = size},
          {.name = "mpi_in_pieces", .size = size, .call_limit_elements = 5},
          {.name = "mpi_checked", .size = size, .is_checked = true}};
}

void run_ranks(const World& world, const std::function<void(ProcessGroup&)>& body) {
  MpiOptions options;
  if (world.call_limit_elements > 0) options.call_limit_elements = world.call_limit_elements;
  options.check_collectives = world.is_checked;
  try {
    configure_arithmetic(1);
    const auto group = make_mpi_world(options);
    body(*group);
    group->close();
  } catch (...) {
    const Failure failure = describe_current_exception();
    std::fprintf(stderr, "[  FAILED  ] %s: %s\n", world.name.c_str(), failure.message.c_str());
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(failure.code));  // the others wait for this rank
  }
}

}  // namespace lockstep
