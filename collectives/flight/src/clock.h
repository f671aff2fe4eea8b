#pragma once

#include <cstdint>
#include <ctime>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace lockstep::flight {

/// Whether ticks() are those of the time stamp counter (layout.h).
bool ticks_are_tsc();
/// Ticks a nanosecond; measured once in a process, over 10 ms. For readers.
double ticks_per_ns();

inline uint64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

inline const bool g_ticks_are_tsc = ticks_are_tsc();

/// 8 ns where the counter serves, 25 ns elsewhere: it is read three times a collective.
inline uint64_t ticks() {
#if defined(__x86_64__)
  if (g_ticks_are_tsc) return __rdtsc();
#endif
  return monotonic_ns();
}

}  // namespace lockstep::flight
