#pragma once

#include <cstdint>

namespace lockstep {

/// What a micro-batch without gradient contributes: -0.0 is addition's identity for every float, +0.0 would turn -0.0
/// into +0.0.
inline constexpr float kNothing = -0.0f;

/// target[i] += term[i], and out[i] = a[i] + b[i]: plain loops, so that every caller rounds alike. out may be a or b.
void add_into(float* target, const float* term, int64_t n);
void add_to(float* out, const float* a, const float* b, int64_t n);

}  // namespace lockstep
