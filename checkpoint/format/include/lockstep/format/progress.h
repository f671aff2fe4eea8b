#pragma once

#include <cstdint>
#include <functional>

namespace lockstep::format {

/// Told bytes done and bytes in all, never from two threads at once; may be empty.
using ProgressCallback = std::function<void(uint64_t, uint64_t)>;

}  // namespace lockstep::format
