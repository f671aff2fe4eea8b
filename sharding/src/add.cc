#include "add.h"

namespace lockstep {

void add_into(float* target, const float* term, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] += term[i];
}

void add_to(float* out, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

}  // namespace lockstep
