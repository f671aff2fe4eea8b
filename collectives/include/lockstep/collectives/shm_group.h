#pragma once

#include <memory>
#include <vector>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// Back end `shm`: CPU ranks of one node read each other's memory.
///
/// `control` is a group of the same ranks by other means (mpi, local); it is asked only here, in split(), and for send
/// and recv. empty_mapped() gives tensors that peers read and write where they lie; others travel in rounds that stay
/// in the caches. Sums follow the canonical tree over the ranks (ordered_reduction.h). Calls are always compared over
/// the ranks: one that differs is a ShapeMismatch that names two of them. Cost: all_reduce of mapped tensors moves 2 p
/// x bytes on the node and meets twice; up to 8 KiB it meets once. Collective. @throws ConfigError on every rank alike
/// where one of them cannot map the others' memory.
std::unique_ptr<ProcessGroup> make_shm_group(std::unique_ptr<ProcessGroup> control);

/// For each rank the lowest rank on its node: those that see the same kernel and the same process numbers. Collective.
std::vector<int> node_of_ranks(ProcessGroup& group);

}  // namespace lockstep
