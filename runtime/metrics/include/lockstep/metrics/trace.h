#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep::metrics {

/// A number beside an event, e.g. {"bytes", 26214400}. The name is not copied: a literal.
struct TraceArg {
  const char* name = nullptr;
  int64_t value = 0;
};

/// What this rank did when: events in memory taken beforehand, to be written as one Chrome trace of all ranks
/// (chrome://tracing, Perfetto).
///
/// Off, an event costs one branch; on, two clock reads and an atomic add, no lock. When the memory is full, later
/// events are dropped and counted, and the trace says so. Times are nanoseconds of CLOCK_REALTIME as read once at
/// construction, carried on by the monotonic clock, so that an adjusted clock does not tear spans.
/// Threads: record() from any number at once; everything else while none records.
class Trace {
 public:
  static constexpr size_t kArgs = 3;

  explicit Trace(size_t capacity_events);
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  /// A named row of this rank: "compute", "collectives", "optimizer", "pipeline". Spans of one track must nest, as
  /// those of one thread do. @return its number; the same name gives the same.
  int track(const std::string& name);

  void start();  ///< the first one takes the memory
  void stop();
  bool is_on() const { return is_on_.load(std::memory_order_relaxed); }

  int64_t now_ns() const;
  /// @param name, category literals: not copied. @param args at most kArgs, more are left out.
  void record(int track, const char* name, const char* category, int64_t begin_ns, int64_t duration_ns,
              std::initializer_list<TraceArg> args = {});

  int64_t num_dropped() const;
  /// Hands the events out, as bytes for write_chrome_trace(), and begins anew.
  /// @param clock_offset_ns rank 0's clock minus ours (clock_offset_ns()); 0 on one host.
  std::string take_bytes(int64_t clock_offset_ns = 0);

 private:
  struct Event;

  const size_t capacity_;
  const int64_t realtime_minus_steady_ns_;
  std::atomic<bool> is_on_{false};
  std::vector<std::string> tracks_;
  std::vector<Event> events_;
  std::atomic<size_t> next_{0};
};

/// A row of a trace, handed down by value to whoever has something to record. By default of no trace at all.
class TraceTrack {
 public:
  TraceTrack() = default;
  TraceTrack(Trace* trace, const std::string& name) : trace_(trace), number_(trace ? trace->track(name) : 0) {}

  /// The trace, while it is on.
  Trace* on() const { return trace_ && trace_->is_on() ? trace_ : nullptr; }
  int number() const { return number_; }

 private:
  Trace* trace_ = nullptr;
  int number_ = 0;
};

/// Records its own lifetime, if the trace is on when it begins.
class TraceSpan {
 public:
  TraceSpan(const TraceTrack& track, const char* name, const char* category, TraceArg first = {}, TraceArg second = {})
      : trace_(track.on()), track_(track.number()), name_(name), category_(category), args_{first, second} {
    if (trace_) begin_ns_ = trace_->now_ns();
  }
  TraceSpan(Trace& trace, int track, const char* name, const char* category, TraceArg arg = {})
      : trace_(trace.is_on() ? &trace : nullptr), track_(track), name_(name), category_(category), args_{arg, {}} {
    if (trace_) begin_ns_ = trace.now_ns();
  }
  ~TraceSpan() {
    if (trace_) end();
  }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  void end();

  Trace* trace_;
  int track_;
  const char *name_, *category_;
  std::array<TraceArg, 2> args_;
  int64_t begin_ns_ = 0;
};

/// The trace of all ranks as JSON: rank = position in `ranks` = pid, tracks as named threads, events of a rank in order
/// of begin, outer ones first.
/// @param ranks take_bytes() of each; zeros at an end are nothing, so that all can be padded to one length and
///        gathered in one call. @throws CorruptData.
std::string chrome_trace(std::span<const std::string> ranks);
/// The same into a new file. @throws IoError.
void write_chrome_trace(Fs& fs, const std::string& path, std::span<const std::string> ranks);

/// One question to the reference clock: sent and returned by ours, received and replied by the reference's, in ns.
struct ClockExchange {
  int64_t sent_ns = 0, received_ns = 0, replied_ns = 0, returned_ns = 0;
};
/// Reference clock minus ours, from the exchange that was under way for the shortest time; off by at most half of that.
/// No exchange: 0. Source: Mills, RFC 5905, section 8.
int64_t clock_offset_ns(std::span<const ClockExchange> exchanges);

}  // namespace lockstep::metrics
