// Ranks of one machine that pretend to live on several nodes.
#include <mpi.h>

#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/shm_group.h>

#include "run_or_abort.h"
#include "worlds.h"

namespace lockstep {
namespace {

const struct {
  const char* name;
  int (*node_of)(int rank, int size);
} kPlaces[] = {
    {"two_level_halves", [](int rank, int size) { return rank * 2 / size; }},
    {"two_level_in_turn", [](int rank, int) { return rank % 3; }},  // no node's ranks follow each other
    {"two_level_uneven", [](int rank, int) { return rank == 0 ? 7 : 3; }},
    {"two_level_one_node", [](int, int) { return 5; }},
    {"two_level_alone", [](int rank, int) { return rank; }},
};

}  // namespace

std::vector<World> worlds() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  std::vector<World> all;
  for (const auto& place : kPlaces) all.push_back({.name = place.name, .size = size, .call_limit_elements = 5});
  return all;
}

void run_ranks(const World& world, const std::function<void(ProcessGroup&)>& body) {
  run_or_abort(world, [&] {
    configure_arithmetic(1);
    std::vector<int> nodes;
    for (const auto& place : kPlaces) {
      for (int rank = 0; rank < world.size && world.name == place.name; ++rank)
        nodes.push_back(place.node_of(rank, world.size));
    }
    const auto group =
        make_two_level_group(make_mpi_world(), nodes, {.round_bytes = int64_t{64} * world.size, .letter_bytes = 128});
    body(*group);
    group->close();
  });
}

}  // namespace lockstep
