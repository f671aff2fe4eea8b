#include <algorithm>
#include <chrono>
#include <limits>
#include <map>

#include <lockstep/base/error.h>
#include <lockstep/metrics/trace.h>

#include "trace_bytes.h"

namespace lockstep::metrics {
namespace {

int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
int64_t realtime_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

}  // namespace

struct Trace::Event {
  const char *name, *category;
  int track;
  int64_t begin_ns, duration_ns;
  std::array<TraceArg, kArgs> args;
};

Trace::Trace(size_t capacity_events)
    : capacity_(capacity_events), realtime_minus_steady_ns_(realtime_ns() - steady_ns()) {}
Trace::~Trace() = default;

int Trace::track(const std::string& name) {
  const auto found = std::find(tracks_.begin(), tracks_.end(), name);
  const auto number = static_cast<int>(found - tracks_.begin());
  if (found == tracks_.end()) tracks_.push_back(name);
  return number;
}

void Trace::start() {
  events_.resize(capacity_);  // touches every page, so that no event has to
  is_on_ = true;
}

void Trace::stop() { is_on_ = false; }

int64_t Trace::now_ns() const { return steady_ns() + realtime_minus_steady_ns_; }

void Trace::record(int track, const char* name, const char* category, int64_t begin_ns, int64_t duration_ns,
                   std::initializer_list<TraceArg> args) {
  if (!is_on()) return;
  const size_t at = next_.fetch_add(1, std::memory_order_relaxed);
  if (at >= capacity_) return;  // counted by next_
  Event& event = events_[at];
  event = {name, category, track, begin_ns, std::max<int64_t>(duration_ns, 0), {}};
  std::copy_n(args.begin(), std::min(args.size(), kArgs), event.args.begin());
}

int64_t Trace::num_dropped() const {
  const size_t next = next_;
  return next > capacity_ ? static_cast<int64_t>(next - capacity_) : 0;
}

std::string Trace::take_bytes(int64_t clock_offset_ns) {
  TraceBytes bytes;
  bytes.tracks = tracks_;
  bytes.num_dropped = num_dropped();
  std::map<std::string, uint32_t> numbers;
  const auto number_of = [&](const char* text) {
    const auto [entry, is_new] = numbers.try_emplace(text ? text : "", static_cast<uint32_t>(bytes.texts.size()));
    if (is_new) bytes.texts.push_back(entry->first);
    return entry->second;
  };
  const size_t count = std::min(next_.load(), capacity_);
  for (size_t i = 0; i < count; ++i) {
    const Event& event = events_[i];
    TraceBytes::Event out{number_of(event.name),
                          number_of(event.category),
                          static_cast<uint32_t>(event.track),
                          0,
                          event.begin_ns + clock_offset_ns,
                          event.duration_ns,
                          {}};
    for (const auto& [name, value] : event.args) {
      if (name) out.args[out.num_args++] = {number_of(name), value};
    }
    bytes.events.push_back(out);
  }
  next_ = 0;
  return bytes.written();
}

void TraceSpan::end() {
  trace_->record(track_, name_, category_, begin_ns_, trace_->now_ns() - begin_ns_, {args_[0], args_[1]});
}

int64_t clock_offset_ns(std::span<const ClockExchange> exchanges) {
  int64_t offset = 0, shortest = std::numeric_limits<int64_t>::max();
  for (const auto& [sent, received, replied, returned] : exchanges) {
    const int64_t under_way = (returned - sent) - (replied - received);
    if (under_way >= shortest) continue;
    shortest = under_way;
    offset = (received - sent) / 2 + (replied - returned) / 2;
  }
  return offset;
}

}  // namespace lockstep::metrics
