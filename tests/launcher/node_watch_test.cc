// What the supervisor makes of what the agents of all nodes say, on a made-up clock and with ranks that are made up
// too.
#include "../../launcher/src/node_watch.h"

#include <algorithm>
#include <map>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../collectives/flight/simulated_world.h"

namespace lockstep::launcher {
namespace {

using flight::Call;
using flight::Liveness;
using flight::NodeReport;
using flight::SimulatedWorld;
using testing::ElementsAre;
using testing::HasSubstr;
using Ranks = std::vector<int32_t>;
using FlightCause = flight::Cause;

constexpr double kT = 3;
#ifdef LOCKSTEP_SANITIZED
constexpr double kLong = 15;
#else
constexpr double kLong = 60;
#endif

/// Nodes of two ranks that train together, their agents, and the supervisor's watch. Agents behave as
/// launcher/src/agent.cc.
class Cluster {
 public:
  explicit Cluster(int nodes, int steps = 4000)
      : world(2 * nodes, 2), agents_(static_cast<size_t>(nodes)), watch_(places(nodes), at(0)) {
    for (int rank = 0; rank < 2 * nodes; ++rank) {
      for (int step = 0; step < steps; ++step)
        world.program(rank).push_back(
            {.call = {.op = flight::Op::kAllReduce, .dtype = flight::Dtype::kF32, .count = 9}, .delay_s = 0.1});
    }
  }

  /// @return seconds until the watch found something; < 0: it did not.
  double run(double seconds) {
    const double begun = world.now();
    double found = -1;
    world.run(seconds, [&] {
      if (found >= 0) return;
      for (size_t i = 0; i < agents_.size(); ++i) step(i);
      pass(watch_.look(now()));
      if (watch_.finding()) found = world.now() - begun;
    });
    return found;
  }

  void cut(size_t node) { agents_[node].is_cut = true; }
  void heal(size_t node) { agents_[node].is_cut = false; }
  void never_connect(size_t node) { agents_[node].is_cut = true; }
  void kill(int rank) { world.kill(rank); }
  void pause_supervisor(double seconds) { skew_ += seconds; }
  int64_t asks() const { return asks_; }
  const std::optional<ClusterFinding>& finding() const { return watch_.finding(); }
  NodeWatch& watch() { return watch_; }
  NodeWatch::Clock::time_point now() const { return at(world.now() + skew_); }

  SimulatedWorld world;
  int64_t steps_done = 0;
  int64_t out_of_memory_kills = 0;  // of node 1

 private:
  struct Agent {
    bool is_cut = false;
    double heartbeat = -1, report = -1, waited = 0;
    std::set<int32_t> dead;
    std::vector<Ask> asks;
  };

  static NodeWatch::Clock::time_point at(double seconds) {
    return NodeWatch::Clock::time_point(std::chrono::hours(1)) +
           std::chrono::milliseconds(std::llround(seconds * 1000));
  }
  static std::vector<NodeWatch::Node> places(int nodes) {
    std::vector<NodeWatch::Node> found;
    found.reserve(static_cast<size_t>(nodes));
    for (int i = 0; i < nodes; ++i) found.push_back({"n" + std::to_string(i), {2 * i, 2 * i + 1}});
    return found;
  }
  NodeReport report(size_t node) const {
    NodeReport found = world.reports()[node];
    for (auto& rank : found.ranks) {
      rank.hang_timeout_ns = static_cast<int64_t>(kT * 1e9);
      rank.step = static_cast<int64_t>(rank.calls.size());
    }
    return found;
  }
  void pass(const std::vector<std::pair<size_t, Ask>>& asks) {
    asks_ += static_cast<int64_t>(asks.size());
    for (const auto& [node, ask] : asks) agents_[node].asks.push_back(ask);
  }
  void step(size_t i) {
    Agent& agent = agents_[i];
    if (agent.is_cut) return agent.asks.clear();
    const NodeReport node = report(i);
    double longest = 0;
    std::set<int32_t> dead;
    int64_t furthest = 0;
    for (const auto& rank : node.ranks) {
      for (const auto& wait : rank.waits) longest = std::max(longest, static_cast<double>(wait.for_ns) / 1e9);
      if (rank.liveness == Liveness::kGone) dead.insert(rank.rank);
      furthest = std::max(furthest, rank.step);
    }
    if (agent.heartbeat < 0 || world.now() - agent.heartbeat >= 0.5 || dead != agent.dead) {
      agent.heartbeat = world.now();
      watch_.heard(i,
                   {.host = node.host,
                    .ranks = {{.rank = node.ranks[0].rank}, {.rank = node.ranks[1].rank}},
                    .timeout_ms = 3000,
                    .step = furthest,
                    .out_of_memory_kills = i == 1 ? out_of_memory_kills : 0},
                   now());
    }
    for (const Ask& ask : agent.asks) {
      NodeReport answer = report(i);
      for (auto& rank : answer.ranks) {
        if (std::count(ask.stacks.begin(), ask.stacks.end(), rank.rank)) rank.stack = "sleeps_forever\n";
      }
      watch_.reported(i, {ask.number, answer}, now());
    }
    agent.asks.clear();
    const bool has_crossed = agent.waited < kT && longest >= kT;
    if (has_crossed || dead != agent.dead || (longest >= kT / 2 && world.now() - agent.report >= 0.5)) {
      watch_.reported(i, {0, node}, now());
      agent.report = world.now();
    }
    agent.waited = longest;
    agent.dead = dead;
  }

  std::vector<Agent> agents_;
  NodeWatch watch_;
  double skew_ = 0;
  int64_t asks_ = 0;
};

TEST(NodeWatch, ATrainingJobIsLeftAlone) {
  Cluster cluster(4);
  EXPECT_LT(cluster.run(kLong), 0);
  EXPECT_EQ(cluster.asks(), 0) << "and nothing is asked of it";
}

TEST(NodeWatch, LateIsNoHang) {
  Cluster cluster(2);
  for (int rank = 0; rank < 4; ++rank) {
    for (size_t step = 5; step < 60; step += 7)
      cluster.world.program(rank)[step + static_cast<size_t>(rank)].delay_s = kT - 0.3;
  }
  EXPECT_LT(cluster.run(kLong), 0) << cluster.finding()->verdict.message;
}

TEST(NodeWatch, AStoppedRankOfAnotherNodeIsNamedWithinTheTimeoutAndASecond) {
  for (int rank = 0; rank < 8; ++rank) {
    Cluster cluster(4);
    cluster.run(5 + 0.05 * rank);
    cluster.world.stop(rank);
    const double took = cluster.run(10);
    ASSERT_GT(took, 0);
    EXPECT_LE(took, kT + 1);
    const ClusterFinding& finding = *cluster.finding();
    EXPECT_EQ(finding.exit_code, 76);
    EXPECT_EQ(finding.verdict.cause, FlightCause::kNeverArrived);
    EXPECT_THAT(finding.verdict.culprits, ElementsAre(rank));
    EXPECT_THAT(finding.verdict.hosts, ElementsAre("n" + std::to_string(rank / 2)));
    EXPECT_EQ(finding.verdict.waiting.size(), 7U);
    EXPECT_THAT(finding.verdict.message, HasSubstr("is stopped"));
    EXPECT_TRUE(finding.lost_hosts.empty());
    EXPECT_TRUE(finding.step);
  }
}

TEST(NodeWatch, OneThatSleepsIsAskedForItsStack) {
  Cluster cluster(4);
  cluster.run(5);
  cluster.world.sleep(5);
  const double took = cluster.run(10);
  ASSERT_GT(took, 0);
  EXPECT_LE(took, kT + 1);
  EXPECT_THAT(cluster.finding()->verdict.culprits, ElementsAre(5));
  EXPECT_THAT(cluster.finding()->verdict.message, HasSubstr("Stack of rank 5: sleeps_forever"));
}

TEST(NodeWatch, RanksOfTwoNodesThatCallOtherThingsAreAMismatch) {
  Cluster cluster(3);
  cluster.world.program(4)[60].call.count = 8;
  const double took = cluster.run(15);
  // The calls complete: only ranks that wait in the end make somebody look.
  if (took < 0) {
    cluster.world.stop(0);
    ASSERT_GT(cluster.run(10), 0);
  }
  EXPECT_EQ(cluster.finding()->verdict.cause, FlightCause::kMismatch);
  EXPECT_THAT(cluster.finding()->verdict.culprits, ElementsAre(4));
}

TEST(NodeWatch, ASilentNodeIsALostHost) {
  for (size_t node = 0; node < 4; ++node) {
    Cluster cluster(4);
    cluster.run(5.1 + 0.1 * static_cast<double>(node));
    cluster.cut(node);
    cluster.world.stop(static_cast<int>(2 * node));
    cluster.world.stop(static_cast<int>(2 * node + 1));
    const double took = cluster.run(10);
    ASSERT_GT(took, 0);
    EXPECT_LE(took, kT + 1);
    EXPECT_GE(took, kT - 0.6) << "a heartbeat earlier at most";
    const ClusterFinding& finding = *cluster.finding();
    const std::string host = "n" + std::to_string(node);
    EXPECT_EQ(finding.exit_code, 75);
    EXPECT_EQ(finding.cause, Cause::kLostHost);
    EXPECT_THAT(finding.lost_hosts, ElementsAre(host));
    EXPECT_THAT(finding.verdict.hosts, ElementsAre(host));
    EXPECT_THAT(finding.verdict.culprits, ElementsAre(2 * static_cast<int>(node), 2 * static_cast<int>(node) + 1));
    EXPECT_THAT(finding.verdict.message, HasSubstr("host " + host + " is silent"));
  }
}

TEST(NodeWatch, TwoHostsBehindOneCutAreLostTogether) {
  Cluster cluster(4);
  cluster.run(5);
  for (const size_t node : {1, 2}) {
    cluster.cut(node);
    for (const size_t rank : {2 * node, 2 * node + 1}) cluster.world.stop(static_cast<int>(rank));
    EXPECT_LT(cluster.run(0.4), 0);  // their heartbeats do not beat together
  }
  ASSERT_GT(cluster.run(10), 0);
  EXPECT_THAT(cluster.finding()->lost_hosts, ElementsAre("n1", "n2"));
  EXPECT_THAT(cluster.finding()->verdict.message, HasSubstr("n1, n2"));
}

TEST(NodeWatch, WhereAllFallSilentNoHostIsBlamed) {
  Cluster cluster(3);
  cluster.run(5);
  for (const size_t node : {0, 1, 2}) cluster.cut(node);
  ASSERT_GT(cluster.run(10), 0);
  EXPECT_EQ(cluster.finding()->exit_code, 75);
  EXPECT_TRUE(cluster.finding()->lost_hosts.empty());
}

TEST(NodeWatch, AnAgentThatIsGoneIsNoLostHostWhileTrainingGoesOn) {
  Cluster cluster(4);
  cluster.run(5);
  cluster.cut(2);
  EXPECT_LT(cluster.run(30), 0) << cluster.finding()->verdict.message;
  cluster.world.stop(0);  // and the others are watched as before
  ASSERT_GT(cluster.run(10), 0);
}

TEST(NodeWatch, ACutThatHealsInTimeIsForgotten) {
  Cluster cluster(4);
  for (int i = 0; i < 5; ++i) {
    cluster.run(5);
    cluster.cut(1);
    EXPECT_LT(cluster.run(kT - 0.8), 0);
    cluster.heal(1);
  }
  EXPECT_LT(cluster.run(10), 0);
}

TEST(NodeWatch, ASupervisorThatWasStoppedBlamesNobody) {
  Cluster cluster(4);
  cluster.run(5);
  cluster.pause_supervisor(100);
  EXPECT_LT(cluster.run(10), 0) << cluster.finding()->verdict.message;
}

TEST(NodeWatch, AJobThatWasStoppedAsAWholeIsNoHang) {
  Cluster cluster(2);
  for (auto& step : cluster.world.program(0)) step.delay_s = 0.05;
  const auto somebody_waits = [&] { return !cluster.world.reports()[0].ranks[0].waits.empty(); };
  for (cluster.run(5); !somebody_waits();) cluster.run(0.05);
  for (int rank = 0; rank < 4; ++rank) cluster.world.stop(rank);
  EXPECT_LT(cluster.run(20), 0) << cluster.finding()->verdict.message;
}

TEST(NodeWatch, ANodeWithoutAnAgentIsWaitedForASecondLonger) {
  Cluster cluster(3);
  cluster.never_connect(1);
  cluster.run(5);
  cluster.world.stop(3);
  const double took = cluster.run(10);
  ASSERT_GT(took, kT + 1);
  EXPECT_LE(took, kT + 2);
  EXPECT_EQ(cluster.finding()->verdict.cause, FlightCause::kAllArrived);
  EXPECT_THAT(cluster.finding()->verdict.message, HasSubstr("nothing is known here of ranks 2, 3"));
  EXPECT_TRUE(cluster.finding()->lost_hosts.empty());
}

TEST(NodeWatch, ADeadRankIsRememberedAndMpirunEndsTheJob) {
  Cluster cluster(4);
  for (int rank = 0; rank < 8; ++rank) {
    for (auto& step : cluster.world.program(rank)) step.delay_s = 0.4;
  }
  const auto somebody_waits = [&] { return !cluster.world.reports()[0].ranks[0].waits.empty(); };
  for (cluster.run(5); somebody_waits();) cluster.run(0.05);  // the others come to the call only after the death
  EXPECT_FALSE(cluster.watch().death(std::nullopt));
  cluster.out_of_memory_kills = 1;  // on node 1
  cluster.kill(3);
  EXPECT_LT(cluster.run(1), 0);
  cluster.kill(4);  // mpirun does that
  EXPECT_LT(cluster.run(0.2), 0);
  const auto death = cluster.watch().death(std::nullopt);
  ASSERT_TRUE(death);
  EXPECT_THAT(death->verdict.culprits, ElementsAre(3)) << "the first";
  EXPECT_THAT(death->verdict.hosts, ElementsAre("n1"));
  EXPECT_THAT(death->verdict.message, HasSubstr("rank 3 (host n1, pid 1003) is gone, and never arrived at all_reduce"));
  EXPECT_TRUE(death->is_out_of_memory);
  const auto named = cluster.watch().death(4);
  ASSERT_TRUE(named);
  EXPECT_THAT(named->verdict.culprits, ElementsAre(4)) << "mpirun knows better";
  EXPECT_FALSE(named->is_out_of_memory) << "that was another host's kernel";
}

TEST(NodeWatch, ADeathThatMpirunDoesNotEndIsAHang) {
  Cluster cluster(2);
  cluster.run(5);
  cluster.kill(1);
  const double took = cluster.run(10);
  ASSERT_GT(took, 0);
  EXPECT_LE(took, kT + 1);
  EXPECT_EQ(cluster.finding()->exit_code, 76);
  EXPECT_EQ(cluster.finding()->verdict.cause, FlightCause::kGone);
  EXPECT_THAT(cluster.finding()->verdict.culprits, ElementsAre(1));
}

TEST(NodeWatch, NodesThatDoNotAnswerWhenMpirunLostAHostAreTheLostOnes) {
  Cluster cluster(4);
  cluster.run(5);
  cluster.cut(1);
  const auto asks = cluster.watch().ask(cluster.now());
  EXPECT_EQ(asks.size(), 4U);
  for (const size_t node : {0, 2}) cluster.watch().reported(node, {asks[node].second.number, {}}, cluster.now());
  EXPECT_FALSE(cluster.watch().have_answered());
  EXPECT_THAT(cluster.watch().unanswered(), ElementsAre(1, 3));
  cluster.watch().ended(3, cluster.now());
  EXPECT_THAT(cluster.watch().unanswered(), ElementsAre(1));
  const auto loss = cluster.watch().loss(cluster.now());
  ASSERT_TRUE(loss);
  EXPECT_THAT(loss->lost_hosts, ElementsAre("n1"));
  EXPECT_THAT(loss->verdict.message, HasSubstr("host n1 is silent"));
}

TEST(NodeWatch, AgentsAreKnownByTheirHostAndElseByTheirRanks) {
  NodeWatch watch({{"gpu1.cluster", {0, 1}}, {"gpu2", {2, 3}}}, {});
  EXPECT_EQ(watch.node_of({.host = "gpu2.cluster", .ranks = {{.rank = 0}}}), 1U);
  EXPECT_EQ(watch.node_of({.host = "gpu1", .ranks = {}}), 0U);
  EXPECT_EQ(watch.node_of({.host = "10-0-0-2", .ranks = {{.rank = 2}, {.rank = 3}}}), 1U);
  EXPECT_EQ(watch.node_of({.host = "10-0-0-2", .ranks = {}}), std::nullopt);
}

// A rank a host: no agent can see that by itself.
TEST(NodeWatch, ARankThatComputesLongerThanThoseOfOtherHostsIsNamedOnceAMinute) {
  NodeWatch watch({{"n0", {0}}, {"n1", {1}}, {"n2", {2}}}, {});
  NodeWatch::Clock::time_point now{};
  const auto after = [&](std::chrono::milliseconds time, std::vector<RankTime> ranks) {
    now += time;
    for (size_t i = 0; i < ranks.size(); ++i)
      watch.heard(i, {.host = "n" + std::to_string(i), .ranks = {ranks[i]}, .timeout_ms = 3000}, now);
    return watch.stragglers(now);
  };
  using std::chrono::seconds;
  constexpr int64_t kSecond = 1'000'000'000;
  const std::vector<RankTime> alike = {{0, 20, 2 * kSecond}, {1, 20, 2 * kSecond}, {2, 20, 2 * kSecond + 99}};
  const std::vector<RankTime> slow = {{0, 20, 2 * kSecond}, {1, 20, 3 * kSecond}, {2, 20, 2 * kSecond}};
  std::vector<RankTime> early = slow;
  early[2].timed_steps = 19;
  EXPECT_EQ(after(seconds(1), alike), "");
  EXPECT_EQ(after(seconds(1), early), "") << "not all have done 20 steps";
  EXPECT_EQ(after(seconds(1), slow),
            "straggler: rank 1 (host n1) computes 1.50 times as long as the median rank: 150.0 ms a step against "
            "100.0 ms, over 20 steps. Mend: look for other work on its cores, heat, or an uneven share");
  for (int second = 1; second < 60; ++second) EXPECT_EQ(after(seconds(1), slow), "") << second;
  EXPECT_THAT(after(seconds(1), slow), HasSubstr("straggler: rank 1"));
  EXPECT_EQ(after(seconds(60), {alike[0], alike[1]}), "");  // the third says nothing any more
  EXPECT_THAT(after(seconds(1), {slow[0], slow[1]}), HasSubstr("straggler: rank 1")) << "of two the faster counts";
  now += seconds(60);
  watch.heard(0, {.host = "n0", .ranks = {slow[0]}}, now);
  watch.heard(2, {.host = "n2", .ranks = {slow[2]}}, now);
  EXPECT_EQ(watch.stragglers(now), "") << "one that is silent is not judged by what it said a minute ago";
  now += seconds(1);
  watch.heard(0, {.host = "n0", .ranks = {slow[0]}}, now);
  watch.heard(1, {.host = "n1", .ranks = {slow[1]}}, now);
  watch.ended(1, now);
  EXPECT_EQ(watch.stragglers(now), "") << "nor is one that has ended";
}

}  // namespace
}  // namespace lockstep::launcher
