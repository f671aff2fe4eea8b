#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <lockstep/flight/ring.h>

namespace lockstep::flight {

enum class Liveness : uint8_t { kRunning, kSleeping, kUninterruptible, kStopped, kGone };
const char* name_of(Liveness liveness);

// Times in reports are ages, in nanoseconds at the time of the report: clocks of two hosts have nothing to do with each
// other.

/// A call in a ring.
struct CallReport {
  uint64_t ticket = 0, group = 0;  ///< number of the call on its rank; id of its group, 0: not recorded
  uint64_t sequence = 0;           ///< in its group, from 1; sends and receives have numbers of their own
  Call call;
  uint64_t fingerprint = 0;
  int32_t bucket = -1;
  std::string label;
  int64_t begun_ago_ns = 0, done_ago_ns = -1;  ///< -1: not done
  bool is_done() const { return done_ago_ns >= 0; }
};

struct GroupReport {
  uint64_t id = 0;
  std::string name;
  std::vector<int32_t> members;  ///< world ranks in the group's order; empty: not known
  uint64_t begun = 0, messages = 0, fingerprint = 0;
};

struct WaitReport {
  uint64_t ticket = 0;
  int64_t for_ns = 0;
};

struct RankReport {
  int32_t rank = 0, world_size = 1, pid = 0;
  Liveness liveness = Liveness::kRunning;
  std::string wchan;  ///< of one that is stopped or hangs in the kernel
  State state = State::kStarting;
  Phase phase = Phase::kStarting;
  int64_t step = -1;
  uint64_t beats = 0;
  int64_t hang_timeout_ns = 0, step_p99_ns = 0;          ///< 0: by the steps' length; 0: not known
  int64_t compute_ns = 0, wall_ns = 0, timed_steps = 0;  ///< of its last 20 steps; how many there were
  uint32_t exit_kind = 0;                                ///< as in Header
  int32_t exit_value = 0;
  std::string exit_message, stack;
  std::vector<GroupReport> groups;
  std::vector<CallReport> calls;  ///< the ring's tail, by ticket; those that are torn are missing
  std::vector<WaitReport> waits;  ///< calls that a thread of it is blocked in
  bool has_ended_well() const { return exit_kind == 1 && exit_message.empty(); }  ///< by itself, with whatever code
};

/// What one node knows.
struct NodeReport {
  std::string host;
  int64_t heard_ago_ns = 0;  ///< set by who receives it
  std::vector<RankReport> ranks;
};

/// A rank's ring, seen from another process.
class RingReader {
 public:
  /// nullptr: no ring, not whole yet, of another version or of another user.
  static std::unique_ptr<RingReader> open(const std::string& path);
  ~RingReader();
  RingReader(const RingReader&) = delete;
  RingReader& operator=(const RingReader&) = delete;

  /// The ring's last `tail` calls, and all of a rank's waits. Cost: 1 us and 0.1 us a call.
  RankReport read(size_t tail = kNumEntries) const;
  /// Whether somebody waits, is stopped or gone, or died: cheap, to see if read() is worth it.
  bool is_quiet() const;
  /// The process is gone, or its pid has gone to another one.
  bool is_gone() const;
  std::string host() const;
  std::string folder() const;
  int pid() const { return file_->header.pid; }
  Header& header() const { return file_->header; }
  /// Async: the rank's heartbeat thread hears of it at once.
  void tell_to_end(std::string_view verdict) const;
  void give_notice(std::string_view text) const;

 private:
  explicit RingReader(RingFile* file) : file_(file) {}
  RingFile* file_;
};

inline constexpr size_t kMaxReportBytes = size_t{1} << 20;  // a frame between agent and supervisor

/// JSON, cut to kMaxReportBytes by leaving out the oldest calls.
std::string encode_report(const NodeReport& report);
/// @throws CorruptData for anything that encode_report() would not write; memory is bounded by 64 times the text.
NodeReport decode_report(std::string_view text);

}  // namespace lockstep::flight
