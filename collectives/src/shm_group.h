#pragma once

#include <memory>

#include <lockstep/collectives/shm_group.h>

#include "shm_collectives.h"

namespace lockstep {

/// Collective over `control`, whose ranks all have `memory` mapped.
std::shared_ptr<ShmChannel> make_shm_channel(std::shared_ptr<ShmMemory> memory, ProcessGroup& control,
                                             ShmOptions options);
std::unique_ptr<ProcessGroup> make_shm_group(std::unique_ptr<ProcessGroup> control, std::shared_ptr<ShmMemory> memory,
                                             ShmOptions options);
at::Tensor empty_in(ShmMemory& memory, int64_t numel, at::TensorOptions options);
/// A peer may look into it once more: its memory is not used again.
void retire(ShmChannel& channel);

}  // namespace lockstep
