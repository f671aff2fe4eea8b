#include "../../launcher/src/agent_messages.h"

#include <gtest/gtest.h>

#include <lockstep/base/error.h>

namespace lockstep::launcher {
namespace {

TEST(AgentMessages, ComeBackAsTheyWere) {
  const Heartbeat heartbeat{.host = "n3",
                            .ranks = {{2, 12, 1'400'000'000}, {5, 0, 0}},
                            .timeout_ms = 3000,
                            .step = 12,
                            .out_of_memory_kills = 1};
  EXPECT_EQ(
      encode(FromAgent(heartbeat)),
      R"(h{"host":"n3","ranks":[[2,12,1400000000],[5,0,0]],"timeout_ms":3000,"step":12,"out_of_memory_kills":1})");
  EXPECT_EQ(std::get<Heartbeat>(decode_from_agent(encode(FromAgent(heartbeat)))), heartbeat);
  const Ask ask{.number = 4'000'000'000, .tail = 2048, .stacks = {0, 7}};
  EXPECT_EQ(std::get<Ask>(decode_from_supervisor(encode(FromSupervisor(ask)))), ask);
  Report report{.number = 0x01020304, .node = {}};
  report.node.host = "n3";
  report.node.ranks.push_back({.rank = 2, .world_size = 4});
  const std::string body = encode(FromAgent(report));
  EXPECT_EQ(body.substr(0, 5), std::string("r\x04\x03\x02\x01"));
  const auto back = std::get<Report>(decode_from_agent(body));
  EXPECT_EQ(back.number, report.number);
  EXPECT_EQ(back.node.host, "n3");
  ASSERT_EQ(back.node.ranks.size(), 1U);
  EXPECT_EQ(back.node.ranks[0].rank, 2);
  EXPECT_TRUE(std::holds_alternative<Bye>(decode_from_agent("b")));
  EXPECT_TRUE(std::holds_alternative<Heard>(decode_from_supervisor("a")));
  EXPECT_TRUE(std::holds_alternative<JobOver>(decode_from_supervisor("e")));
}

TEST(AgentMessages, AHostWithAsManyRanksAsThereMayBeIsHeard) {
  Heartbeat heartbeat{.host = std::string(64, 'n')};
  for (int32_t rank = 0; rank < 4096; ++rank) heartbeat.ranks.push_back({rank + 1'000'000, INT64_MAX, INT64_MAX});
  EXPECT_EQ(std::get<Heartbeat>(decode_from_agent(encode(FromAgent(heartbeat)))), heartbeat);
  heartbeat.ranks.push_back({});
  EXPECT_THROW(decode_from_agent(encode(FromAgent(heartbeat))), CorruptData);
}

TEST(AgentMessages, AnythingElseIsCorrupt) {
  const std::string deep(300'000, '[');
  for (const std::string& body :
       {std::string(),
        std::string("x"),
        std::string("bb"),
        std::string("h"),
        std::string("h[]"),
        std::string("h{}"),
        std::string("r"),
        std::string("r\0\0\0\0", 5),
        std::string("r\0\0\0\0{}", 7),
        "h" + deep,
        std::string(R"(h{"host":"n3","ranks":[[-1,0,0]],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[[0.5,0,0]],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[[[0],0,0]],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[0],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[[0,1]],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[[0,1,2,3]],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[[0,-1,0]],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[[0,1,-1]],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[],"timeout_ms":9223372036854775807,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"n3","ranks":[],"timeout_ms":18446744073709551615,"step":0,"out_of_memory_kills":0})"),
        std::string(R"(h{"host":"\u001b[2J","ranks":[],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"),
        R"(h{"host":")" + std::string(65, 'n') + R"(","ranks":[],"timeout_ms":0,"step":0,"out_of_memory_kills":0})"})
    EXPECT_THROW(decode_from_agent(body), CorruptData) << body.substr(0, 100);
  for (const std::string& body :
       {std::string(), std::string("aa"), std::string("q"), std::string("q{}"),
        std::string(R"(q{"number":1,"tail":2049,"stacks":[]})"), std::string(R"(q{"number":-1,"tail":1,"stacks":[]})"),
        std::string(R"(q{"number":1,"tail":1,"stacks":["x"]})"), "q" + deep})
    EXPECT_THROW(decode_from_supervisor(body), CorruptData) << body.substr(0, 100);
}

}  // namespace
}  // namespace lockstep::launcher
