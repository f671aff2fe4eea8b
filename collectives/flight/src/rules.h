#pragma once

#include <cstddef>

namespace lockstep::flight {

inline constexpr size_t kStragglerSteps = 20;  // RELIABILITY 1, row 5

}  // namespace lockstep::flight
