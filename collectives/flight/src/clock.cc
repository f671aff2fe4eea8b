#include "clock.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lockstep::flight {

// Invariant: it runs at one speed, in step on all cores, also while they sleep (leaf 0x80000007, EDX bit 8).
// Source: Intel SDM volume 3, 18.17.1; AMD64 volume 2, 13.2.4.
bool ticks_are_tsc() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0x80000007, &a, &b, &c, &d) != 0 && (d >> 8 & 1) != 0;
#else
  return false;
#endif
}

double ticks_per_ns() {
  static const double rate = [] {
    if (!g_ticks_are_tsc) return 1.0;
    const uint64_t ns = monotonic_ns(), begin = ticks();
    const timespec pause{0, 10'000'000};
    nanosleep(&pause, nullptr);
    return static_cast<double>(ticks() - begin) / static_cast<double>(monotonic_ns() - ns);
  }();
  return rate;
}

}  // namespace lockstep::flight
