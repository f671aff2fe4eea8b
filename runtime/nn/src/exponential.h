#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#define LOCKSTEP_INLINE __attribute__((always_inline)) inline

namespace lockstep::nn {

/// e^x to about 1 ulp: x = n ln 2 + r, a polynomial in r, n added to the exponent. Results lie in 2^-126 .. 2^127; nan
/// stays. Loops over it vectorise, with the instructions of the function it is inlined into.
LOCKSTEP_INLINE float exponential(float x) {
  const float bounded = std::min(std::max(x, -87.33f), 88.0f);
  const float n =
      __builtin_fmaf(bounded, 1.44269504f, 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, bounded));
  float p = 1.9875691500e-4f;  // Cephes' expf coefficients
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p, r * r, r + 1.0f);
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

}  // namespace lockstep::nn
