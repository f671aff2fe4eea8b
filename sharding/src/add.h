#pragma once

#include <cstdint>

namespace lockstep {

/// target[i] += term[i], and out[i] = a[i] + b[i]: plain loops, so that every caller rounds alike. out may be a or b.
void add_into(float* target, const float* term, int64_t n);
void add_to(float* out, const float* a, const float* b, int64_t n);

}  // namespace lockstep
