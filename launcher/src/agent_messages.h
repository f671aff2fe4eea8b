#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <lockstep/flight/report.h>

namespace lockstep::launcher {

/// How long one rank computed in its last steps.
struct RankTime {
  int32_t rank = 0;
  int64_t timed_steps = 0, compute_ns = 0;  ///< as in flight::RankReport
  friend bool operator==(const RankTime&, const RankTime&) = default;
};

/// What agents and their supervisor say to each other over a SecureChannel. A body is a letter, then:
///
///   agent       h  JSON {"host":"n3","ranks":[[2,12,1400000000]],"timeout_ms":3000,"step":12,"out_of_memory_kills":0}
///                  each 0.5 s; of a rank its number, timed steps and compute_ns
///               r  ask's number u32 little-endian (0: nobody asked), then encode_report()
///               b  nothing: its ranks are gone, and it goes too
///   supervisor  a  nothing: it heard a heartbeat
///               q  JSON {"number":5,"tail":2048,"stacks":[2]}: a report, with the stacks of these ranks
///               e  nothing: the job is over, the agent has nothing more to say about it
///
/// There is no word that ends or starts anything: a supervisor ends a job through mpirun, which started it.
struct Heartbeat {
  std::string host;
  std::vector<RankTime> ranks;      ///< those it has found so far
  int64_t timeout_ms = 0;           ///< how long its ranks may keep others waiting; 0: not known yet
  int64_t step = -1;                ///< the furthest of its ranks
  int64_t out_of_memory_kills = 0;  ///< by the node's kernel, since the agent began
  friend bool operator==(const Heartbeat&, const Heartbeat&) = default;
};
struct Report {
  uint32_t number = 0;
  flight::NodeReport node;
};
struct Bye {};
struct Heard {};
struct Ask {
  uint32_t number = 0;
  uint32_t tail = 0;  ///< calls of each rank
  std::vector<int32_t> stacks;
  friend bool operator==(const Ask&, const Ask&) = default;
};
struct JobOver {};

using FromAgent = std::variant<Heartbeat, Report, Bye>;
using FromSupervisor = std::variant<Heard, Ask, JobOver>;

std::string encode(const FromAgent& message);
std::string encode(const FromSupervisor& message);
/// @throws CorruptData for what encode() would not write. Memory is bounded as decode_report()'s.
FromAgent decode_from_agent(std::string_view body);
FromSupervisor decode_from_supervisor(std::string_view body);

}  // namespace lockstep::launcher
