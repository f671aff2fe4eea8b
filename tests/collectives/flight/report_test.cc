#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/flight/report.h>

#include "simulated_world.h"

namespace lockstep::flight {
namespace {

NodeReport a_report() {
  SimulatedWorld world(4);
  const uint64_t odd = world.add_group("odd", {3, 1, 0});
  for (int r = 0; r < 4; ++r) {
    world.program(r).assign(30, {1, {Op::kAllReduce, Dtype::kF32, Reduction::kSum, 1024, -1}, 0.1, "block0.weight"});
    if (r != 2) world.program(r).push_back({odd, {Op::kBroadcast, Dtype::kU8, Reduction::kNone, 5, 2}, 0.1, ""});
  }
  world.run(2.02);
  world.stop(1);
  world.run(0.2);
  NodeReport report = world.reports()[0];
  report.ranks[1].wchan = "do_signal_stop";
  report.ranks[2].exit_kind = 2;
  report.ranks[2].exit_value = 11;
  report.ranks[3].stack = "main\nstart";
  return report;
}

TEST(ReportTest, WhatIsWrittenIsReadBack) {
  const NodeReport report = a_report();
  const std::string once = encode_report(report);
  const NodeReport read = decode_report(once);
  EXPECT_EQ(encode_report(read), once);
  EXPECT_EQ(read.host, report.host);
  ASSERT_EQ(read.ranks.size(), 4U);
  EXPECT_EQ(read.ranks[1].liveness, Liveness::kStopped);
  EXPECT_EQ(read.ranks[1].wchan, "do_signal_stop");
  EXPECT_EQ(read.ranks[3].stack, "main\nstart");
  EXPECT_EQ(read.ranks[0].groups[1].members, (std::vector<int32_t>{3, 1, 0}));
  EXPECT_EQ(read.ranks[0].calls.size(), report.ranks[0].calls.size());
  EXPECT_EQ(read.ranks[0].waits.size(), 1U);
}

TEST(ReportTest, LargeOnesAreCutToAFrameAndKeepWhatHangs) {
  NodeReport report = a_report();
  CallReport call = report.ranks[0].calls[0];
  call.label = std::string(63, 'x');
  report.ranks[0].calls.assign(2048, call);
  for (int i = 0; i < 60; ++i) report.ranks.push_back(report.ranks[0]);
  const std::string encoded = encode_report(report);
  EXPECT_LE(encoded.size(), kMaxReportBytes);
  EXPECT_EQ(decode_report(encoded).ranks.size(), 64U);
}

TEST(ReportTest, ControlCharactersAndBytesThatAreNoTextDoNotGetThrough) {
  NodeReport report = a_report();
  report.ranks[0].exit_message = "\x1b[31mred";
  report.ranks[0].stack = "\xff\xfe";
  const NodeReport read = decode_report(encode_report(report));
  EXPECT_EQ(read.ranks[0].exit_message, "?[31mred");
}

TEST(ReportTest, OtherTextsAreRefused) {
  const std::string good = encode_report(a_report());
  const auto with = [&](const std::string& what, const std::string& instead) {
    std::string text = good;
    const size_t at = text.find(what);
    EXPECT_NE(at, std::string::npos) << what;
    return text.replace(at, what.size(), instead);
  };
  const std::string bad[] = {"",
                             "[]",
                             "{}",
                             "null",
                             "{\"host\":3,\"ranks\":[]}",
                             std::string(100000, '['),
                             good.substr(0, good.size() / 2),
                             good + good,
                             with("\"liveness\":3", "\"liveness\":5"),
                             with("\"liveness\":3", "\"liveness\":-1"),
                             with("\"liveness\":3", "\"liveness\":\"stopped\""),
                             with("\"liveness\":3", "\"liveness\":3.5"),
                             with("\"rank\":1,", "\"rank\":4,"),
                             with("\"rank\":1,", "\"rank\":-1,"),
                             with("\"rank\":1,", "\"rank\":18446744073709551615,"),
                             with("\"count\":4", "\"count\":2000000"),
                             with("\"count\":4", "\"count\":0"),
                             with("\"waits\":[[", "\"waits\":[[1,2],[1,2],[1,2],[1,2],[1,2],[1,2],[1,2],[1,2],["),
                             with("\"waits\":[[", "\"waits\":[[1],["),
                             with("do_signal_stop", std::string(65, 'x')),
                             std::string(kMaxReportBytes + 1, ' ')};
  for (const std::string& text : bad) EXPECT_THROW(decode_report(text), CorruptData) << text.substr(0, 200);
}

TEST(ReportTest, ManyGroupsOfManyRanksAreRefusedBeforeTheyTakeMemory) {
  std::string groups;
  for (int i = 0; i < 64; ++i)
    groups +=
        std::string(i ? "," : "") +
        R"({"id":1,"name":"","members":{"first":0,"stride":1,"count":1000000},"begun":0,"messages":0,"fingerprint":0})";
  std::string text = encode_report({.host = "h", .ranks = {RankReport{}}});
  const std::string none = "\"groups\":[]";
  text.replace(text.find(none), none.size(), "\"groups\":[" + groups + "]");
  EXPECT_THROW(decode_report(text), CorruptData);
}

TEST(ReportTest, DamagedOnesNeverCrash) {
  const std::string good = encode_report(a_report());
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 300; ++i) {
    std::string text = good;
    for (int flips = 1 + i % 3; flips > 0; --flips) text[random() % text.size()] = static_cast<char>(random());
    try {
      decode_report(text);
    } catch (const CorruptData&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace lockstep::flight
