// Ranks as processes: mpirun decides how many. Each world is a copy of MPI_COMM_WORLD.
#include <mpi.h>

#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/mpi_group.h>

#include "run_or_abort.h"
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
  run_or_abort(world, [&] {
    configure_arithmetic(1);
    const auto group = make_mpi_world(options);
    body(*group);
    group->close();
  });
}

}  // namespace lockstep
