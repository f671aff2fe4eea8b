#pragma once

#include <memory>

#include <lockstep/collectives/process_group.h>
#include <lockstep/flight/ring.h>

namespace lockstep {

/// `world` with each call noted in `ring` as one of `group`, from its beginning to its end, for who watches from
/// outside; so are the groups that are split off. All else passes through. Cost: 30 to 60 ns a call; a split also
/// gathers who is in the new group.
std::unique_ptr<ProcessGroup> watch_world(std::unique_ptr<ProcessGroup> world, std::shared_ptr<flight::Ring> ring,
                                          std::unique_ptr<flight::Ring::Group> group);

}  // namespace lockstep
