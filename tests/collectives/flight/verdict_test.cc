#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/flight/verdict.h>

#include "simulated_world.h"

namespace lockstep::flight {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr Rules kRules{.timeout_ns = 3'000'000'000,
                       .long_timeout_ns = 20'000'000'000,
                       .storage_timeout_ns = 40'000'000'000,
                       .silent_ns = 2'000'000'000};
const Call kSum{Op::kAllReduce, Dtype::kF32, Reduction::kSum, 1024, -1};
const Call kGather{Op::kAllGather, Dtype::kF32, Reduction::kNone, 4096, -1};

// `steps` world all-reduces on every rank, each after a tenth of a second.
SimulatedWorld sums(int ranks, int steps) {
  SimulatedWorld world(ranks);
  for (int r = 0; r < ranks; ++r) world.program(r).assign(steps, {1, kSum, 0.1, "block0.weight"});
  return world;
}

Verdict judge_now(const SimulatedWorld& world, const std::vector<int>& without = {}) {
  return judge(world.reports(without), kRules);
}

TEST(VerdictTest, ARunThatGoesOnIsNoHang) {
  SimulatedWorld world = sums(4, 50);
  world.run(6, [&] { ASSERT_EQ(judge_now(world).cause, Cause::kNone) << judge_now(world).message; });
}

TEST(VerdictTest, AStoppedRankIsNamedWithTheCallItHoldsUp) {
  SimulatedWorld world = sums(4, 50);
  world.run(1);
  world.stop(2);
  world.run(2.5, [&] { ASSERT_EQ(judge_now(world).cause, Cause::kNone); });
  world.run(1);
  const Verdict verdict = judge_now(world);
  EXPECT_EQ(verdict.cause, Cause::kNeverArrived);
  EXPECT_THAT(verdict.culprits, ElementsAre(2));
  EXPECT_THAT(verdict.hosts, ElementsAre("n0"));
  EXPECT_THAT(verdict.waiting, ElementsAre(0, 1, 3));
  EXPECT_EQ(verdict.group, "world");
  EXPECT_EQ(verdict.call.call.op, Op::kAllReduce);
  const auto reports = world.reports();
  EXPECT_EQ(verdict.call.sequence, reports[0].ranks[0].groups[0].begun);
  EXPECT_THAT(verdict.message, ::testing::StartsWith("rank 2 (host n0, pid 1002) is stopped"));
  EXPECT_THAT(verdict.message, HasSubstr("block0.weight, 1024 x f32"));
  EXPECT_THAT(verdict.message, HasSubstr("ranks 0, 1, 3 have waited"));
}

TEST(VerdictTest, ASleepingRankIsNamed) {
  for (int culprit = 0; culprit < 3; ++culprit) {
    SimulatedWorld world = sums(3, 50);
    world.run(1);
    world.sleep(culprit);
    world.run(4);
    const Verdict verdict = judge_now(world);
    EXPECT_EQ(verdict.cause, Cause::kNeverArrived);
    EXPECT_THAT(verdict.culprits, ElementsAre(culprit));
  }
}

TEST(VerdictTest, WhoLoadsOrSavesMayTakeLonger) {
  for (const auto& [phase, patience_s] : {std::pair{Phase::kEvaluating, 20}, std::pair{Phase::kSaving, 40}}) {
    SimulatedWorld world = sums(3, 50);
    world.run(1);
    world.sleep(0);
    world.set_phase(0, phase);
    world.run(patience_s - 5,
              [&, phase = phase] { ASSERT_EQ(judge_now(world).cause, Cause::kNone) << name_of(phase); });
    world.run(7);
    EXPECT_THAT(judge_now(world).culprits, ElementsAre(0)) << name_of(phase);
  }
}

TEST(VerdictTest, ADeadRankIsToldAtOnce) {
  SimulatedWorld world = sums(3, 50);
  world.run(1);
  world.kill(1);
  world.run(0.3);
  const Verdict verdict = judge_now(world);
  EXPECT_EQ(verdict.cause, Cause::kGone);
  EXPECT_THAT(verdict.culprits, ElementsAre(1));
  EXPECT_THAT(verdict.message, HasSubstr("never arrived at all_reduce"));
}

TEST(VerdictTest, WhoDiedOfASignalComesBeforeThoseKilledForIt) {
  SimulatedWorld world = sums(3, 50);
  world.run(1);
  world.kill(0);
  world.kill(2);
  auto reports = world.reports();
  reports[0].ranks[2].exit_kind = 2;
  reports[0].ranks[2].exit_value = 11;
  const Verdict verdict = judge(reports, kRules);
  EXPECT_THAT(verdict.culprits, ElementsAre(2));
  EXPECT_THAT(verdict.message, HasSubstr("died of signal 11"));
}

TEST(VerdictTest, ARankThatEndedEarlyIsNamed) {
  SimulatedWorld world = sums(3, 10);
  world.program(2).resize(9);
  world.run(5);
  auto reports = world.reports();
  reports[0].ranks[2].exit_kind = 1;
  reports[0].ranks[2].state = State::kEnded;
  reports[0].ranks[2].liveness = Liveness::kGone;
  const Verdict verdict = judge(reports, kRules);
  EXPECT_EQ(verdict.cause, Cause::kNeverArrived);
  EXPECT_THAT(verdict.culprits, ElementsAre(2));
  EXPECT_THAT(verdict.message, HasSubstr("has ended with code 0"));
}

struct Difference {
  const char* what;
  Call theirs;
};

TEST(VerdictTest, OneThatCallsSomethingElseIsNamedAtOnceWithBothSides) {
  const Difference kDifferences[] = {
      {"order", kGather},
      {"count", {Op::kAllReduce, Dtype::kF32, Reduction::kSum, 1023, -1}},
      {"dtype", {Op::kAllReduce, Dtype::kBf16, Reduction::kSum, 1024, -1}},
      {"reduction", {Op::kAllReduce, Dtype::kF32, Reduction::kMax, 1024, -1}},
      {"root", {Op::kAllReduce, Dtype::kF32, Reduction::kSum, 1024, 1}},
  };
  for (const auto& [what, theirs] : kDifferences) {
    for (int culprit = 0; culprit < 4; ++culprit) {
      SimulatedWorld world = sums(4, 30);
      world.program(culprit)[5].call = theirs;
      bool is_found = false;
      world.run(5, [&, what = what] {
        const Verdict verdict = judge_now(world);
        if (is_found || verdict.cause == Cause::kNone) return;
        is_found = true;
        ASSERT_EQ(verdict.cause, Cause::kMismatch);
        ASSERT_THAT(verdict.culprits, ElementsAre(culprit)) << what;
        ASSERT_EQ(verdict.call.sequence, 6);
        ASSERT_LT(world.now(), 1.5);
      });
      EXPECT_TRUE(is_found) << what;
    }
  }
}

TEST(VerdictTest, AMissingCallIsNamedByWhatCameInstead) {
  SimulatedWorld world = sums(4, 8);
  for (int r = 0; r < 4; ++r) world.program(r)[4].call = kGather;
  world.program(3).erase(world.program(3).begin() + 4);  // goes on with the sums
  world.run(4);
  const Verdict verdict = judge_now(world);
  EXPECT_EQ(verdict.cause, Cause::kMismatch);
  EXPECT_THAT(verdict.culprits, ElementsAre(3));
  EXPECT_EQ(verdict.call.sequence, 5);
  EXPECT_THAT(verdict.message, HasSubstr("called all_reduce 5 of group 'world'"));
  EXPECT_THAT(verdict.message, HasSubstr("called all_gather 5 of group 'world'"));
}

TEST(VerdictTest, TwoGroupsCalledInDifferentOrderAreACircle) {
  SimulatedWorld world(4);
  const uint64_t other = world.add_group("data", {0, 1, 2, 3});
  for (int r = 0; r < 4; ++r) world.program(r) = {{1, kSum, 0.1, ""}, {1, kSum, 0.1, ""}, {other, kGather, 0.1, ""}};
  std::swap(world.program(2)[1], world.program(2)[2]);
  world.run(4);
  const Verdict verdict = judge_now(world);
  EXPECT_EQ(verdict.cause, Cause::kMismatch);
  EXPECT_THAT(verdict.culprits, ElementsAre(2));
  EXPECT_THAT(verdict.message, HasSubstr("waits in all_gather 1 of group 'data'"));
  EXPECT_EQ(verdict.call.call.op, Op::kAllReduce);
  EXPECT_EQ(verdict.call.sequence, 2);
}

TEST(VerdictTest, OneWhoLeavesACallOutAndWaitsElsewhereForThoseInItIsNamed) {
  for (const int culprit : {0, 2}) {  // of two in the small group, the one who waits there alone
    SimulatedWorld world(4);
    const uint64_t pair = world.add_group("pair", {0, 2});
    for (int r = 0; r < 4; ++r) {
      world.program(r) = {{1, kSum, 0.1, ""}, {1, kGather, 0.1, ""}};
      if (r % 2 == 0) world.program(r).push_back({pair, kSum, 0.1, ""});
      world.program(r).push_back({1, kSum, 0.1, ""});
    }
    world.program(culprit).erase(world.program(culprit).begin() + 1);
    world.run(5);
    const Verdict verdict = judge_now(world);
    EXPECT_EQ(verdict.cause, Cause::kMismatch);
    EXPECT_THAT(verdict.culprits, ElementsAre(culprit)) << verdict.message;
    EXPECT_EQ(verdict.call.call.op, Op::kAllGather);
  }
}

TEST(VerdictTest, MessagesArePointedAtTheirPeer) {
  SimulatedWorld world(3);
  for (int i = 0; i < 20; ++i) {
    world.program(0).push_back({1, {Op::kSend, Dtype::kF32, Reduction::kNone, 8, 1}, 0.1, ""});
    world.program(1).push_back({1, {Op::kReceive, Dtype::kF32, Reduction::kNone, 8, 0}, 0.1, ""});
    world.program(1).push_back({1, {Op::kSend, Dtype::kF32, Reduction::kNone, 8, 2}, 0.1, ""});
    world.program(2).push_back({1, {Op::kReceive, Dtype::kF32, Reduction::kNone, 8, 1}, 0.1, ""});
  }
  world.run(1);
  EXPECT_EQ(judge_now(world).cause, Cause::kNone);
  world.sleep(0);
  world.run(4);
  const Verdict verdict = judge_now(world);
  EXPECT_EQ(verdict.cause, Cause::kNeverArrived);
  EXPECT_THAT(verdict.culprits, ElementsAre(0));  // rank 2 waits for 1, which waits for 0
  EXPECT_EQ(verdict.call.call.op, Op::kReceive);
}

TEST(VerdictTest, TwoThatReceiveFromEachOtherAreACircle) {
  SimulatedWorld world(2);
  world.program(0) = {{1, {Op::kReceive, Dtype::kF32, Reduction::kNone, 8, 1}, 0.1, ""}};
  world.program(1) = {{1, {Op::kReceive, Dtype::kF32, Reduction::kNone, 8, 0}, 0.1, ""}};
  world.run(4);
  EXPECT_EQ(judge_now(world).cause, Cause::kMismatch);
}

// pipeline 4 x data 4 x tensor 4: each step is tensor sums, messages along the pipeline, then the sum over data.
SimulatedWorld mesh_world(std::mt19937& random, double most_delay_s, int steps) {
  SimulatedWorld world(64);
  std::vector<uint64_t> tensor(64), data(64), pipeline(64);
  const auto add = [&](const char* name, auto key_of, std::vector<uint64_t>& ids) {
    std::map<int, std::vector<int32_t>> groups;
    for (int r = 0; r < 64; ++r) groups[key_of(r)].push_back(r);
    for (auto& [key, members] : groups) {
      const uint64_t id = world.add_group(name, members);
      for (const int32_t member : members) ids[member] = id;
    }
  };
  add(
      "tensor", [](int r) { return r / 4; }, tensor);
  add(
      "data", [](int r) { return r / 16 * 4 + r % 4; }, data);
  add(
      "pipeline", [](int r) { return r % 16; }, pipeline);
  std::uniform_real_distribution<double> delay(0, most_delay_s);
  for (int step = 0; step < steps; ++step) {
    for (int r = 0; r < 64; ++r) {
      const int stage = r / 16;
      if (stage > 0)
        world.program(r).push_back(
            {pipeline[r], {Op::kReceive, Dtype::kBf16, Reduction::kNone, 64, stage - 1}, delay(random), ""});
      world.program(r).push_back({tensor[r], kSum, delay(random), ""});
      if (stage < 3)
        world.program(r).push_back(
            {pipeline[r], {Op::kSend, Dtype::kBf16, Reduction::kNone, 64, stage + 1}, delay(random), ""});
      world.program(r).push_back({data[r], kSum, delay(random), "layer"});
      world.program(r).push_back({1, {Op::kAllGather, Dtype::kU8, Reduction::kNone, 512, -1}, 0, ""});
    }
  }
  return world;
}

TEST(VerdictTest, WaitingThatSpreadsThroughAMeshLeadsToTheOneThatStopped) {
  std::mt19937 random(20261127);
  for (int trial = 0; trial < 24; ++trial) {
    SimulatedWorld world = mesh_world(random, 0.3, 40);
    world.run(1 + std::uniform_real_distribution<double>(0, 3)(random));
    const int culprit = std::uniform_int_distribution<int>(0, 63)(random);
    switch (trial % 3) {
      case 0:
        world.stop(culprit);
        break;
      case 1:
        world.sleep(culprit);
        break;
      default:
        world.kill(culprit);
    }
    world.run(8);
    const Verdict verdict = judge_now(world);
    ASSERT_EQ(verdict.cause, trial % 3 == 2 ? Cause::kGone : Cause::kNeverArrived) << trial << verdict.message;
    ASSERT_THAT(verdict.culprits, ElementsAre(culprit)) << trial << verdict.message;
    ASSERT_FALSE(verdict.waiting.empty());
    ASSERT_THAT(verdict.hosts, ElementsAre("n" + std::to_string(culprit / 8)));
  }
}

TEST(VerdictTest, TwoThatStopAreBothNamed) {
  std::mt19937 random(3);
  SimulatedWorld world = mesh_world(random, 0.2, 40);
  world.run(2);
  world.stop(5);
  world.stop(6);
  world.run(8);
  EXPECT_THAT(judge_now(world).culprits, ElementsAre(5, 6));
}

TEST(VerdictTest, RandomDelaysBelowTheTimeoutAreNoHang) {
  std::mt19937 random(4);
  for (int trial = 0; trial < 2; ++trial) {
    SimulatedWorld world = mesh_world(random, 2.9, 30);
    int tick = 0;
    world.run(40, [&] {
      if (++tick % 8 != 0) return;
      const Verdict verdict = judge_now(world);
      ASSERT_EQ(verdict.cause, Cause::kNone) << verdict.message;
    });
  }
}

TEST(VerdictTest, OneNodeAloneNamesItsOwnCulprit) {
  std::mt19937 random(5);
  SimulatedWorld world = mesh_world(random, 0.2, 40);
  world.run(2);
  world.stop(17);
  world.run(8);
  const auto all = world.reports();
  for (size_t node = 0; node < all.size(); ++node) {
    const Verdict verdict = judge(std::span(&all[node], 1), kRules);
    if (node == 2) {
      EXPECT_THAT(verdict.culprits, ElementsAre(17)) << verdict.message;
      EXPECT_EQ(verdict.cause, Cause::kNeverArrived);
    } else {
      EXPECT_EQ(verdict.cause, Cause::kAllArrived) << verdict.message;
      EXPECT_THAT(verdict.message, HasSubstr("nothing is known here"));
    }
  }
}

TEST(VerdictTest, ASilentHostIsNamed) {
  std::mt19937 random(6);
  SimulatedWorld world = mesh_world(random, 0.2, 40);
  world.run(2);
  for (int r = 24; r < 32; ++r) world.stop(r);  // nobody sees that: the host does not answer
  auto before = world.reports();
  world.run(8);
  auto reports = world.reports();
  reports[3] = before[3];
  reports[3].heard_ago_ns = 8'000'000'000;
  const Verdict verdict = judge(reports, kRules);
  EXPECT_EQ(verdict.cause, Cause::kAllArrived);
  EXPECT_THAT(verdict.hosts, ElementsAre("n3"));
  EXPECT_THAT(verdict.message, HasSubstr("host n3 is silent"));
}

TEST(VerdictTest, WhenAllAreThereItIsTheNetwork) {
  SimulatedWorld world = sums(3, 50);
  world.run(1);
  world.stop(1);
  world.run(5);
  auto reports = world.reports();
  RankReport& last = reports[0].ranks[1];
  last = reports[0].ranks[0];  // it comes, and nothing happens
  last.rank = 1;
  EXPECT_EQ(judge(reports, kRules).cause, Cause::kAllArrived) << judge(reports, kRules).message;
  for (RankReport& rank : reports[0].ranks) rank.phase = Phase::kStarting;  // many ranks on few cores take their time
  EXPECT_EQ(judge(reports, kRules).cause, Cause::kNone) << judge(reports, kRules).message;
  last.waits[0].for_ns = last.calls.back().begun_ago_ns = 1'000'000'000;  // but only just
  EXPECT_EQ(judge(reports, kRules).cause, Cause::kNone);
}

TEST(VerdictTest, OneThatBeganAndDoesNotGoOnIsNamed) {
  SimulatedWorld world = sums(3, 50);
  world.run(1);
  world.stop(1);
  world.run(5);
  auto reports = world.reports();
  RankReport& idle = reports[0].ranks[1];
  idle = reports[0].ranks[0];
  idle.rank = 1;
  idle.waits.clear();  // it computes while its sum should be moving
  const Verdict verdict = judge(reports, kRules);
  EXPECT_EQ(verdict.cause, Cause::kNeverArrived);
  EXPECT_THAT(verdict.culprits, ElementsAre(1));
  EXPECT_THAT(verdict.message, HasSubstr("began but does not go on with"));
}

TEST(VerdictTest, TheRecordIsJsonWithTheCulpritFirst) {
  SimulatedWorld world = sums(4, 50);
  world.run(1);
  world.stop(2);
  world.run(4);
  auto reports = world.reports();
  reports[0].ranks[2].stack = "main\n\xff";  // whatever lies in memory
  const auto record = nlohmann::json::parse(verdict_json(judge(reports, kRules), reports));
  EXPECT_EQ(record["cause"], "never_arrived");
  EXPECT_EQ(record["culprits"], nlohmann::json({2}));
  EXPECT_EQ(record["op"], "all_reduce");
  EXPECT_EQ(record["culprit_reports"][0]["liveness"], "stopped");
}

TEST(RulesTest, TheTimeoutFollowsTheStepsUnlessItIsGiven) {
  std::vector<NodeReport> nodes(1);
  nodes[0].ranks.resize(2);
  EXPECT_EQ(rules_for(nodes).timeout_ns, 120'000'000'000);
  nodes[0].ranks[0].step_p99_ns = 10'000'000'000;
  EXPECT_EQ(rules_for(nodes).timeout_ns, 120'000'000'000);  // the other's is not known
  nodes[0].ranks[1].step_p99_ns = 1'000'000;
  EXPECT_EQ(rules_for(nodes).timeout_ns, 50'000'000'000);
  nodes[0].ranks[0].step_p99_ns = 1'000'000;
  EXPECT_EQ(rules_for(nodes).timeout_ns, 30'000'000'000);
  nodes[0].ranks[0].hang_timeout_ns = 3'000'000'000;
  EXPECT_EQ(rules_for(nodes).timeout_ns, 3'000'000'000);
  EXPECT_GE(rules_for(nodes).long_timeout_ns, 120'000'000'000);
}

TEST(StragglersTest, OneWhoComputesLongerThanTheMedianIsNamed) {
  std::vector<NodeReport> nodes(2, {.host = "a"});
  nodes[1].host = "b";
  for (int r = 0; r < 6; ++r) {
    RankReport rank{.rank = r};
    rank.timed_steps = 20;
    rank.compute_ns = 2'000'000'000 + r * 10'000'000;
    nodes[r / 3].ranks.push_back(rank);
  }
  EXPECT_TRUE(find_stragglers(nodes).empty());
  nodes[1].ranks[1].compute_ns = 2'800'000'000;
  const auto stragglers = find_stragglers(nodes);
  ASSERT_EQ(stragglers.size(), 1U);
  EXPECT_EQ(stragglers[0].rank, 4);
  EXPECT_EQ(stragglers[0].host, "b");
  EXPECT_NEAR(stragglers[0].ratio, 1.38, 0.02);
  nodes[0].ranks[0].timed_steps = 19;  // too early to tell
  EXPECT_TRUE(find_stragglers(nodes).empty());
}

TEST(StragglersTest, OfAHostThatIsSlowAsAWholeTheSlowestRankIsDescribedAndTheOthersAreListed) {
  std::vector<NodeReport> nodes = {{.host = "a"}, {.host = "b"}};
  for (int r = 0; r < 20; ++r) {
    RankReport rank{.rank = r};
    rank.timed_steps = 20;
    rank.compute_ns = r < 10 ? 2'000'000'000 : 3'000'000'000 + r * 1'000'000;
    nodes[r / 10].ranks.push_back(rank);
  }
  const auto stragglers = find_stragglers(nodes);
  ASSERT_EQ(stragglers.size(), 10U);
  EXPECT_THAT(
      describe(stragglers),
      testing::StartsWith("straggler: rank 19 (host b) computes 1.51 times as long as the median rank: 150.9 ms a step "
                          "against 100.0 ms, over 20 steps; too slow too: rank 18 (host b), 17 (host b), "));
  EXPECT_THAT(describe(stragglers), testing::HasSubstr("12 (host b) and 2 more. Mend: "));
  EXPECT_THAT(describe(std::span(stragglers).first(2)), testing::HasSubstr("too slow too: rank 18 (host b). Mend: "));
}

TEST(StragglersTest, StepsOfMicrosecondsAreNotCompared) {
  std::vector<NodeReport> nodes(1);
  for (int r = 0; r < 3; ++r) {
    RankReport rank{.rank = r};
    rank.timed_steps = 100;
    rank.compute_ns = r == 1 ? 50'000'000 : 10'000'000;
    nodes[0].ranks.push_back(rank);
  }
  EXPECT_TRUE(find_stragglers(nodes).empty());
}

}  // namespace
}  // namespace lockstep::flight
