// The Trainer's own parts: lanes, the packed exchange, the heartbeat, what the watchdog left.
#include <atomic>
#include <chrono>
#include <fstream>
#include <set>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/base/fs.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/metrics/run_log.h>

#include "../base/temp_dir.h"
#include "heartbeat.h"
#include "lanes.h"
#include "run_directory.h"
#include "save_interval.h"
#include "step_exchange.h"

namespace lockstep::train {
namespace {

TEST(LanePoolTest, EveryLaneRunsEachBodyOnceOnItsOwnPreparedThread) {
  std::mutex mutex;
  std::set<std::thread::id> prepared;
  LanePool pool(4, [&] {
    const std::lock_guard lock(mutex);
    prepared.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(pool.size(), 4);
  EXPECT_EQ(prepared.size(), 4);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::thread::id> ran(4);
    pool.run([&](int lane) { ran[lane] = std::this_thread::get_id(); });
    EXPECT_EQ(std::set<std::thread::id>(ran.begin(), ran.end()), prepared);
    EXPECT_EQ(ran[0], std::this_thread::get_id());
  }
}

TEST(LanePoolTest, AnExceptionComesOutAfterAllLanesEndedAndThePoolGoesOn) {
  LanePool pool(3, [] {});
  std::atomic<int> ended{0};
  EXPECT_THROW(pool.run([&](int lane) {
    if (lane == 1) throw ConfigError("lane 1");
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ++ended;
  }),
               ConfigError);
  EXPECT_EQ(ended, 2);
  EXPECT_NO_THROW(pool.run([&](int) { ++ended; }));
  EXPECT_EQ(ended, 5);
}

TEST(SpareLanesTest, ARankHasAtLeastOneLaneAndRanksOfANodeShareItsCores) {
  std::atomic<int> alone{0}, total{0};
  run_local_ranks(1, [&](ProcessGroup& group) { alone = spare_lanes(group, 1); });
  run_local_ranks(8, [&](ProcessGroup& group) {
    EXPECT_GE(spare_lanes(group, 1), 1);
    EXPECT_LE(spare_lanes(group, 2), spare_lanes(group, 1));
    total += spare_lanes(group, 1);
  });
  EXPECT_GE(alone, 1);
  EXPECT_LE(total, std::max(alone.load(), 8));
}

TEST(SaveIntervalTest, IsYoungsAndLeavesStorageFree) {
  EXPECT_DOUBLE_EQ(seconds_between_saves(0.5, 1, 3600), 60);
  EXPECT_DOUBLE_EQ(seconds_between_saves(0.5, 20, 3600), 200) << "storage is at work for a tenth of the time at most";
  EXPECT_DOUBLE_EQ(seconds_between_saves(60, 60, 1e6), 600);
  EXPECT_DOUBLE_EQ(seconds_between_saves(0, 100, 1e6), 600);
}

TEST(SaveIntervalTest, CountsStepsWhereTheyAreGiven) {
  const SaveInterval interval(5, 3600);
  EXPECT_TRUE(interval.saves_between());
  EXPECT_TRUE(interval.is_due_after(10));
  EXPECT_FALSE(interval.is_due_after(12));
  EXPECT_FALSE(interval.is_due_by_clock(SaveInterval::Clock::now() + std::chrono::hours(1)));
  EXPECT_FALSE(SaveInterval(0, 3600).saves_between());
  EXPECT_FALSE(SaveInterval(0, 3600).is_due_after(10));
}

TEST(SaveIntervalTest, GoesByTheClockAndTheLastCost) {
  using std::chrono::seconds;
  const auto start = SaveInterval::Clock::now();
  SaveInterval interval(-1, 3600);
  EXPECT_TRUE(interval.saves_between());
  EXPECT_FALSE(interval.is_due_after(500));
  EXPECT_FALSE(interval.is_due_by_clock(start + seconds(59)));
  EXPECT_TRUE(interval.is_due_by_clock(start + seconds(61)));
  interval.saved({.step = 1, .durable = true, .seconds = 9, .stall_seconds = 0.5, .storage_seconds = 1},
                 start + seconds(100));
  EXPECT_FALSE(interval.is_due_by_clock(start + seconds(159)));
  EXPECT_TRUE(interval.is_due_by_clock(start + seconds(161)));
  interval.saved({.step = 2}, start + seconds(200));
  EXPECT_FALSE(interval.is_due_by_clock(start + seconds(259))) << "a failed save is not tried again at once";
  EXPECT_TRUE(interval.is_due_by_clock(start + seconds(261)));
}

class ExchangeTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, ExchangeTest, testing::Values(1, 2, 3, 4, 7, 8));

TEST_P(ExchangeTest, EveryRankSeesTheSameWhateverTheSplit) {
  constexpr int kTerms = 840;  // split evenly by every world size
  StepReport whole;
  for (int term = 0; term < kTerms; ++term) whole.loss.add(1.0 / (term + 3));
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    StepReport mine;
    for (int term = group.rank(); term < kTerms; term += group.size()) {
      mine.loss.add(1.0 / (term + 3));
      ++mine.count;
    }
    mine.stop = group.rank() == group.size() - 1;
    const StepReport all = exchange(group, mine);
    EXPECT_EQ(all.loss.value(), whole.loss.value());
    EXPECT_EQ(all.count, kTerms);
    EXPECT_EQ(all.stop, 1);
    EXPECT_EQ(all.has_correct, 0);
    EXPECT_FALSE(all.squares.has_non_finite());
  });
}

TEST_P(ExchangeTest, EveryRanksShareOfWorkArrives) {
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    StepReport mine;
    mine.busy = 0.5 + group.rank();
    std::vector<uint64_t> digests = {7};
    std::vector<double> busy;
    exchange(group, mine, &digests, &busy);
    ASSERT_EQ(busy.size(), static_cast<size_t>(group.size()));
    for (int rank = 0; rank < group.size(); ++rank) EXPECT_EQ(busy[static_cast<size_t>(rank)], 0.5 + rank);
  });
}

TEST(SlowestRankTest, IsComparedWithTheMedianOnceAllAreKnown) {
  const auto slowest = [](const std::vector<double>& busy) { return slowest_rank(busy); };
  EXPECT_FALSE(slowest({0.5}));
  EXPECT_FALSE(slowest({0.5, 0, 0.9})) << "one is not known";
  const auto of_three = slowest({0.5, 0.25, 0.75});
  ASSERT_TRUE(of_three);
  EXPECT_EQ(of_three->rank, 2);
  EXPECT_EQ(of_three->ratio, 1.5);
  EXPECT_EQ(slowest({0.75, 0.25})->rank, 0);
  EXPECT_EQ(slowest({0.75, 0.25})->ratio, 3) << "of two the faster is the measure";
  EXPECT_EQ(slowest({0.5, 0.5, 0.5, 0.5})->ratio, 1);
}

TEST_P(ExchangeTest, OneRanksInfinityIsEverybodys) {
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    StepReport mine;
    const float value = group.rank() == 0 ? INFINITY : 1.0F;
    mine.squares.add_squares({&value, 1});
    EXPECT_TRUE(exchange(group, mine).squares.has_non_finite());
  });
}

TEST(HeartbeatTest, BeatsFromItsOwnThreadAndEndsAtOnce) {
  const TempDir dir;
  auto world = make_local_world(1);
  const uint64_t epoch = checkpoint::acquire_epoch(real_fs(), *world[0], dir.path(), /*take_over=*/false);
  std::atomic<int> beats{0};
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    beats += kind == "write" && path.ends_with(".beat");
    return Fault{};
  });
  const auto start = std::chrono::steady_clock::now();
  {
    const Heartbeat heartbeat(fs, dir.path(), epoch);
    while (beats == 0 && std::chrono::steady_clock::now() - start < std::chrono::seconds(30))
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_GE(beats, 1);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(4)) << "the end waits for no interval";
}

TEST(HeartbeatTest, StorageThatFailsDoesNotEndTheProcess) {
  const TempDir dir;
  std::atomic<int> asked{0};
  FaultFs fs(real_fs(), [&](const std::string&, const std::string&, int64_t) {
    ++asked;
    return Fault{.error_number = EIO};
  });
  {
    const Heartbeat heartbeat(fs, dir.path(), 1);
    while (asked == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(asked, 1);
}

TEST(NewHangsTest, EachVerdictComesIntoTheLedgerOnce) {
  const TempDir dir;
  EXPECT_TRUE(new_hangs(real_fs(), dir / "not there").empty());
  const auto write = [&](const std::string& name, const std::string& text) { std::ofstream(dir / name) << text; };
  write(
      "hang-20261127T190000Z-n1.json",
      R"({"cause":"gone","culprits":[2],"hosts":["n3"],"group":"world","sequence":7,"op":"all_reduce","message":"rank 2"})");
  write("hang-20261127T190001Z-n1.json", "{}");     // somebody else's
  write("hang-20261127T190002Z-n1.json", "{\"ca");  // torn
  write("hang-20261127T190003Z-n1.json.new", "{}");
  const std::vector<std::string> events = new_hangs(real_fs(), dir.path());
  ASSERT_EQ(events.size(), 1U);
  EXPECT_EQ(events[0],
            R"({"record":"hang-20261127T190000Z-n1.json","cause":"gone","culprits":[2],"hosts":["n3"],"group":"world",)"
            R"("sequence":7,"op":"all_reduce","message":"rank 2"})");
  {
    metrics::Ledger ledger(real_fs(), dir / "ledger.jsonl", 1);
    ledger.append("hang", events[0]);
    ledger.append("start", R"({"epoch":1,"step":0})");
    ledger.publish();
  }
  EXPECT_TRUE(new_hangs(real_fs(), dir.path()).empty());
  EXPECT_EQ(metrics::verify_ledger(real_fs(), dir / "ledger.jsonl"), 2);
}

}  // namespace
}  // namespace lockstep::train
