#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/metrics/trace.h>

#include "temp_dir.h"

namespace lockstep::metrics {
namespace {

using nlohmann::json;
using testing::ElementsAre;

json parsed(const std::vector<std::string>& ranks) { return json::parse(chrome_trace(ranks)); }

std::vector<json> events_of(const json& trace, const std::string& phase, int rank) {
  std::vector<json> events;
  for (const auto& event : trace.at("traceEvents")) {
    if (event.at("ph") == phase && event.at("pid") == rank) events.push_back(event);
  }
  return events;
}

std::vector<std::string> names(const std::vector<json>& events) {
  std::vector<std::string> names;
  names.reserve(events.size());
  for (const auto& event : events) names.push_back(event.at("name"));
  return names;
}

// A rank whose step takes from `begin_ns` on, with what is inside recorded first, as it ends first.
std::string rank_bytes(int64_t begin_ns, int64_t clock_offset_ns = 0) {
  Trace trace(16);
  const int compute = trace.track("compute"), collectives = trace.track("collectives");
  trace.start();
  trace.record(compute, "forward", "step", begin_ns, 4'001, {{"leaf", 3}});
  trace.record(compute, "backward", "step", begin_ns + 4'001, 5'000);
  trace.record(collectives, "all_reduce", "bucket", begin_ns + 5'500, 2'000, {{"bucket", 2}, {"bytes", 1 << 20}});
  trace.record(compute, "step", "step", begin_ns, 10'000);
  return trace.take_bytes(clock_offset_ns);
}

TEST(TraceTest, TheTraceOfTwoRanksHasTheKeysReadersWant) {
  const json trace = parsed({rank_bytes(1'000'000'000'000'000'123), rank_bytes(1'000'000'000'000'002'123)});
  EXPECT_EQ(trace.at("baseTimeNanoseconds"), 1'000'000'000'000'000'123);
  EXPECT_EQ(trace.at("distributedInfo").at("world_size"), 2);
  EXPECT_EQ(trace.at("displayTimeUnit"), "ms");
  for (const auto& event : trace.at("traceEvents")) {
    for (const char* key : {"ph", "name", "pid", "tid", "ts"}) EXPECT_TRUE(event.contains(key)) << event;
  }
  for (const int rank : {0, 1}) {
    std::map<std::string, json> rows;
    for (const auto& event : events_of(trace, "M", rank)) rows[event.at("name")].push_back(event.at("args"));
    EXPECT_EQ(rows.at("process_name").at(0).at("name"), "rank " + std::to_string(rank));
    EXPECT_EQ(rows.at("process_sort_index").at(0).at("sort_index"), rank);
    EXPECT_EQ(rows.at("thread_name").at(1).at("name"), "collectives");
    const auto spans = events_of(trace, "X", rank);
    EXPECT_THAT(names(spans), ElementsAre("step", "forward", "backward", "all_reduce"));
    EXPECT_EQ(spans[0].at("ts"), 2.0 * rank);
    EXPECT_EQ(spans[1].at("dur"), 4.001);
    EXPECT_EQ(spans[1].at("args"), json({{"leaf", 3}}));
    EXPECT_EQ(spans[3].at("args"), json({{"bucket", 2}, {"bytes", 1 << 20}}));
    EXPECT_EQ(spans[3].at("cat"), "bucket");
    EXPECT_EQ(spans[3].at("tid"), 1);
  }
}

TEST(TraceTest, SpansOfScopesNestAndStandInOrder) {
  Trace trace(100);
  const int track = trace.track("compute");
  EXPECT_EQ(trace.track("optimizer"), track + 1);
  EXPECT_EQ(trace.track("compute"), track);
  trace.start();
  for (int step = 0; step < 3; ++step) {
    const TraceSpan outer(trace, track, "step", "step", {"step", step});
    for (int leaf = 0; leaf < 2; ++leaf) {
      const TraceSpan middle(trace, track, "leaf", "step");
      const TraceSpan inner(trace, track, "forward", "step");
    }
  }
  const auto spans = events_of(parsed({trace.take_bytes()}), "X", 0);
  ASSERT_EQ(spans.size(), 15u);
  std::vector<double> open;  // ends of the spans around
  double last = 0;
  for (const auto& span : spans) {
    const double begin = span.at("ts"), end = begin + span.at("dur").get<double>();
    EXPECT_GE(begin, last);
    last = begin;
    while (!open.empty() && open.back() < begin) open.pop_back();
    if (!open.empty()) {
      EXPECT_LE(end, open.back() + 1e-6) << span;
    }
    open.push_back(end);
  }
  EXPECT_EQ(spans[5].at("args").at("step"), 1);
}

TEST(TraceTest, ATrackIsHandedDownAndByDefaultLeadsNowhere) {
  Trace trace(5);
  const TraceTrack first(&trace, "first"), second(&trace, "second"), nowhere;
  { const TraceSpan before(second, "before", "x"); }
  trace.start();
  { const TraceSpan span(second, "launch", "x", {"bucket", 3}, {"bytes", 4096}); }
  { const TraceSpan span(nowhere, "lost", "x", {"bucket", 4}); }
  const auto spans = events_of(parsed({trace.take_bytes()}), "X", 0);
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].at("tid"), 1);
  EXPECT_EQ(spans[0].at("args"), json({{"bucket", 3}, {"bytes", 4096}}));
}

TEST(TraceTest, AFullTraceDropsWhatComesLaterAndSaysHowMuch) {
  Trace trace(5);
  const int track = trace.track("compute");
  trace.start();
  for (int i = 0; i < 12; ++i) trace.record(track, i < 5 ? "early" : "late", "x", 1000L * i, 10);
  EXPECT_EQ(trace.num_dropped(), 7);
  const json written = parsed({trace.take_bytes()});
  EXPECT_THAT(names(events_of(written, "X", 0)), testing::Each("early"));
  const auto notes = events_of(written, "i", 0);
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_EQ(notes[0].at("args").at("dropped"), 7);
  EXPECT_EQ(notes[0].at("ts"), 4.01);
  EXPECT_EQ(trace.num_dropped(), 0);
  trace.record(track, "again", "x", 0, 0);
  EXPECT_THAT(names(events_of(parsed({trace.take_bytes()}), "X", 0)), ElementsAre("again"));
}

TEST(TraceTest, OffItRecordsNothing) {
  Trace trace(5);
  const int track = trace.track("compute");
  const auto attempt = [&] {
    const TraceSpan span(trace, track, "span", "x");
    trace.record(track, "event", "x", 0, 0);
  };
  attempt();
  trace.start();
  trace.stop();
  attempt();
  EXPECT_TRUE(events_of(parsed({trace.take_bytes()}), "X", 0).empty());
  trace.start();
  attempt();
  EXPECT_EQ(events_of(parsed({trace.take_bytes()}), "X", 0).size(), 2u);
}

TEST(TraceTest, ThreadsAtOnceLoseNothing) {
  Trace trace(8000);
  std::vector<int> tracks;
  tracks.reserve(4);
  for (int i = 0; i < 4; ++i) tracks.push_back(trace.track("lane " + std::to_string(i)));
  trace.start();
  std::vector<std::thread> threads;
  threads.reserve(tracks.size());
  for (const int track : tracks) {
    threads.emplace_back([&trace, track] {
      for (int i = 0; i < 2000; ++i) trace.record(track, "event", "x", i, 1, {{"i", i}});
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(trace.num_dropped(), 0);
  std::map<int, int> next;
  for (const auto& event : events_of(parsed({trace.take_bytes()}), "X", 0)) {
    EXPECT_EQ(event.at("args").at("i"), next[event.at("tid")]++);
  }
  for (const int track : tracks) EXPECT_EQ(next[track], 2000);
}

TEST(TraceTest, EveryDroppedEventIsCounted) {
  Trace trace(1);
  const int track = trace.track("compute");
  trace.start();
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int event = 0; event < 200'000; ++event) trace.record(track, "event", "x", event, 1);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(trace.num_dropped(), 4 * 200'000 - 1);
}

TEST(TraceTest, OddNamesAndPaddingComeThrough) {
  Trace trace(4);
  const int track = trace.track("a \"quoted\"\nrow");
  trace.start();
  trace.record(track, "back\\slash\x01\xff", "", 5, -1);
  const auto spans = events_of(parsed({trace.take_bytes() + std::string(100, '\0')}), "X", 0);
  EXPECT_THAT(names(spans), ElementsAre("back\\slash\x01\uFFFD"));
  EXPECT_EQ(spans[0].at("dur"), 0);
}

TEST(TraceTest, BytesThatAreTornOrForeignAreRefused) {
  const std::string whole = rank_bytes(1000);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(parsed({whole.substr(0, size)}), CorruptData) << size;
  }
  EXPECT_THROW(parsed({"{}" + whole}), CorruptData);
  EXPECT_EQ(parsed({}).at("traceEvents").size(), 0u);
}

TEST(TraceTest, ClocksAreBroughtTogetherByTheQuickestExchange) {
  const int64_t ahead = 3'000'000'000'000;  // the reference's
  std::vector<ClockExchange> exchanges;
  for (const auto& [there, back] : {std::pair(40'000, 900'000), std::pair(5'000, 5'200), std::pair(300'000, 50'000)}) {
    const int64_t sent = 1'000'000'000'000'000'000 + 7L * there;
    exchanges.push_back({sent, sent + there + ahead, sent + there + 1'000 + ahead, sent + there + 1'000 + back});
  }
  EXPECT_NEAR(static_cast<double>(clock_offset_ns(exchanges) - ahead), 0, 100);
  EXPECT_EQ(clock_offset_ns({}), 0);
  const int64_t begin = 2'000'000'000'000'000'000;
  const json trace = parsed({rank_bytes(begin + ahead), rank_bytes(begin, ahead)});
  EXPECT_EQ(events_of(trace, "X", 0)[0].at("ts"), events_of(trace, "X", 1)[0].at("ts"));
}

TEST(TraceTest, ItIsWrittenIntoANewFile) {
  TempDir dir;
  const std::vector<std::string> ranks = {rank_bytes(1000)};
  write_chrome_trace(real_fs(), dir / "trace.json", ranks);
  EXPECT_EQ(read_text(real_fs(), dir / "trace.json", 1 << 20), chrome_trace(ranks));
  EXPECT_THROW(write_chrome_trace(real_fs(), dir / "trace.json", ranks), IoError);
}

}  // namespace
}  // namespace lockstep::metrics
