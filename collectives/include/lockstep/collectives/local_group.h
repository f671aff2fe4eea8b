#pragma once

#include <functional>
#include <memory>
#include <vector>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// Ranks as threads of one process: the reference back end, what every other must equal, and what most tests run on.
/// Returns one group for each rank; hand each to its own thread.
std::vector<std::unique_ptr<ProcessGroup>> make_local_world(int world_size);

/// Runs `body` on `world_size` threads, each with one intra-op thread and its group; rethrows the first rank's
/// exception after aborting the others, so that no thread is left behind.
void run_local_ranks(int world_size, const std::function<void(ProcessGroup&)>& body);

}  // namespace lockstep
