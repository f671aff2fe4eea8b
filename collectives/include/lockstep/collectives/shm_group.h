#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

struct ShmOptions {
  /// What a rank puts into its ring at a time; the ring is four of these. At least 64 bytes a rank. A smaller one costs
  /// more meetings than it saves in the caches (measured 32 KiB to 2 MiB, 2 ranks).
  int64_t round_bytes = int64_t{512} << 10;
  /// What is no larger travels with the call itself. Tests lower both to walk the other paths with small tensors.
  int64_t letter_bytes = 8192;
};

/// Back end `shm`: CPU ranks of one node read each other's memory.
///
/// `control` is a group of the same ranks by other means (mpi, local); it is asked only here, in split(), and for send
/// and recv. empty_mapped() gives tensors that peers read and write where they lie; others travel in rounds. Sums
/// follow the canonical tree over the ranks (ordered_reduction.h). Calls are always compared over the ranks: one that
/// differs is a ShapeMismatch that names two of them. Cost: all_reduce of mapped tensors moves 2 p x bytes on the node
/// and meets twice; up to 8 KiB it meets once. Collective. @throws ConfigError on every rank alike where one of them
/// cannot map the others' memory.
std::unique_ptr<ProcessGroup> make_shm_group(std::unique_ptr<ProcessGroup> control, ShmOptions options = {});

/// Back end `two_level`: several nodes. What ranks of one node have for each other goes through its shared memory, the
/// rest by `world` (mpi): every pair in all_to_all and reductions, so that sums follow the canonical tree on any
/// layout; a gathered or broadcast piece crosses to each other node once and is handed out there.
/// @param nodes a number for each rank's node, any distribution; tests pretend that one machine is several.
/// split() gives `shm` where all members share a node, `world`'s kind where no two do, else two levels again.
std::unique_ptr<ProcessGroup> make_two_level_group(std::unique_ptr<ProcessGroup> world, std::vector<int> nodes,
                                                   ShmOptions options = {});

/// For each rank the lowest rank on its node: those that see the same kernel and the same process numbers. Collective.
std::vector<int> node_of_ranks(ProcessGroup& group);

}  // namespace lockstep
