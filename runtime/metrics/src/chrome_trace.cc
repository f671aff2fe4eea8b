#include <algorithm>
#include <cstdio>
#include <limits>

#include <nlohmann/json.hpp>

#include <lockstep/metrics/trace.h>

#include "trace_bytes.h"

namespace lockstep::metrics {
namespace {

std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

// Nanoseconds as microseconds, every digit.
std::string microseconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%lld.%03lld", static_cast<long long>(ns / 1000),
                static_cast<long long>(ns % 1000));
  return text;
}

class Writer {
 public:
  Writer(int64_t base_ns, size_t world_size) {
    out_ = R"({"schemaVersion": 1, "displayTimeUnit": "ms", "baseTimeNanoseconds": )" + std::to_string(base_ns) +
           R"(, "distributedInfo": {"rank": 0, "world_size": )" + std::to_string(world_size) + "},\n\"traceEvents\": [";
  }

  void event(char phase, size_t rank, size_t track, const std::string& quoted_name, const std::string& rest) {
    out_ += is_first_ ? "\n" : ",\n";
    is_first_ = false;
    out_ += std::string(R"({"ph": ")") + phase + R"(", "pid": )" + std::to_string(rank) + R"(, "tid": )" +
            std::to_string(track) + R"(, "name": )" + quoted_name + ", " + rest + "}";
  }
  void metadata(size_t rank, size_t track, const char* what, const std::string& value) {
    const bool is_index = std::string(what).ends_with("sort_index");
    event('M', rank, track, quoted(what),
          std::string(R"("ts": 0, "args": {")") + (is_index ? "sort_index" : "name") + "\": " + value + "}");
  }
  std::string finish() { return std::move(out_) + "\n]}\n"; }

 private:
  std::string out_;
  bool is_first_ = true;
};

void name_rows(Writer& writer, size_t rank, const TraceBytes& trace) {
  writer.metadata(rank, 0, "process_name", quoted("rank " + std::to_string(rank)));
  writer.metadata(rank, 0, "process_sort_index", std::to_string(rank));
  for (size_t track = 0; track < trace.tracks.size(); ++track) {
    writer.metadata(rank, track, "thread_name", quoted(trace.tracks[track]));
    writer.metadata(rank, track, "thread_sort_index", std::to_string(track));
  }
}

void write_rank(Writer& writer, size_t rank, TraceBytes& trace, int64_t base_ns) {
  name_rows(writer, rank, trace);
  std::vector<std::string> texts;  // each quoted once
  for (const auto& text : trace.texts) texts.push_back(quoted(text));
  std::stable_sort(trace.events.begin(), trace.events.end(), [](const auto& a, const auto& b) {
    return a.begin_ns != b.begin_ns ? a.begin_ns < b.begin_ns : a.duration_ns > b.duration_ns;
  });
  int64_t end_ns = base_ns;
  for (const auto& event : trace.events) {
    end_ns = std::max(end_ns, event.begin_ns + event.duration_ns);
    std::string args;
    for (uint32_t i = 0; i < event.num_args; ++i) {
      args += (i ? ", " : "") + texts[event.args[i].name] + ": " + std::to_string(event.args[i].value);
    }
    writer.event('X', rank, event.track, texts[event.name],
                 "\"cat\": " + texts[event.category] + ", \"ts\": " + microseconds(event.begin_ns - base_ns) +
                     ", \"dur\": " + microseconds(event.duration_ns) + ", \"args\": {" + args + "}");
  }
  if (trace.num_dropped > 0) {
    writer.event('i', rank, 0,
                 quoted("trace full: " + std::to_string(trace.num_dropped) + " events after this are missing"),
                 R"("cat": "trace", "s": "p", "ts": )" + microseconds(end_ns - base_ns) + R"(, "args": {"dropped": )" +
                     std::to_string(trace.num_dropped) + "}");
  }
}

}  // namespace

std::string chrome_trace(std::span<const std::string> ranks) {
  std::vector<TraceBytes> traces;
  int64_t base_ns = std::numeric_limits<int64_t>::max();
  for (const auto& bytes : ranks) {
    traces.push_back(TraceBytes::read(bytes));
    for (const auto& event : traces.back().events) base_ns = std::min(base_ns, event.begin_ns);
  }
  if (base_ns == std::numeric_limits<int64_t>::max()) base_ns = 0;  // no event at all
  Writer writer(base_ns, ranks.size());
  for (size_t rank = 0; rank < traces.size(); ++rank) write_rank(writer, rank, traces[rank], base_ns);
  return writer.finish();
}

void write_chrome_trace(Fs& fs, const std::string& path, std::span<const std::string> ranks) {
  write_durable(fs, path, chrome_trace(ranks));
}

}  // namespace lockstep::metrics
