#pragma once

#include <cstdint>
#include <string>

#include <lockstep/collectives/process_group.h>

namespace lockstep::train {

/// What this process holds in memory now.
int64_t resident_bytes();

/// Peak bytes by purpose on the rank that has most of each, counted by the CPU allocator since the process began, as a
/// JSON object. Collective.
std::string peak_memory_json(ProcessGroup& world);

}  // namespace lockstep::train
