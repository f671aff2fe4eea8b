#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace lockstep::metrics {

/// A rank's events on their way to rank 0. Between ranks of one program only, so no format that must be read later:
///
///     u32 'LTR1' | u64 dropped | u32 n, n x text (tracks) | u32 n, n x text (names) | u32 n, n x event
///     text:  u32 bytes, the bytes
///     event: u32 name, u32 category, u32 track, u32 num_args, i64 begin_ns, i64 duration_ns,
///            num_args x (u32 name, i64 value)
///
/// Little-endian, packed. What follows is padding: zeros.
struct TraceBytes {
  struct Arg {
    uint32_t name;
    int64_t value;
  };
  struct Event {
    uint32_t name, category, track, num_args;
    int64_t begin_ns, duration_ns;
    std::array<Arg, 3> args;
  };

  int64_t num_dropped = 0;
  std::vector<std::string> tracks, texts;
  std::vector<Event> events;

  std::string written() const;
  /// @throws CorruptData
  static TraceBytes read(const std::string& bytes);
};

}  // namespace lockstep::metrics
