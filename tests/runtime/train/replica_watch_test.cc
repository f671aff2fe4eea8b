// One bit of one replica flips while a run goes on: which rank it was is found, and nothing is found where nothing
// flipped.
#include "replica_watch.h"

#include <atomic>
#include <cstring>
#include <fstream>
#include <mutex>
#include <random>
#include <regex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/train/trainer.h>

#include "../base/temp_dir.h"
#include "regression_task.h"

namespace lockstep::train {
namespace {

using nlohmann::json;
using test::RegressionTask;
using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kLeaves = 8;

Options watched_run(const std::string& run_dir, int64_t interval_steps) {
  Options options;
  options.run_dir = run_dir;
  options.steps = 40;
  options.global_batch_size = 2 * kLeaves;
  options.micro_batch_size = 2;
  options.parallel_micro_batches = 1;
  options.schedule.learning_rate = 0.02;
  options.checkpoint_interval_steps = 0;
  options.eval_interval_steps = 0;
  options.log_interval_steps = 1000;
  options.replica_check_interval_steps = interval_steps;
  return options;
}

// Which bit goes wrong where, and when: before the forward of the rank's first micro-batch of that step.
struct Flip {
  int rank = 0;
  int64_t step = 0;
  size_t tensor = 0;
  int64_t element = 0;
  int bit = 0;
  bool stays = false;  // flips again in each later step: a bit that is stuck
};

void flip(torch::nn::Module& model, const Flip& which) {
  const at::Tensor parameter = model.parameters()[which.tensor].detach();
  auto* words = static_cast<uint32_t*>(parameter.mutable_data_ptr());
  words[which.element % parameter.numel()] ^= 1U << which.bit;
}

struct Stop {
  bool came = false;
  int64_t step = -1;
  std::string message;
};

/// Trains on `world_size` ranks; how it was stopped by a NodeFault.
Stop run_with(int world_size, const Options& options, const Flip& which) {
  std::mutex mutex;
  Stop stop;
  const int64_t leaves_a_step = kLeaves / world_size;
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    RegressionTask task;
    task.before_forward = [&, calls = int64_t{0}](torch::nn::Module& model) mutable {
      const int64_t step = calls / leaves_a_step;
      const bool is_first = calls++ % leaves_a_step == 0;
      if (group.rank() == which.rank && is_first && (step == which.step || (which.stays && step > which.step)))
        flip(model, which);
    };
    try {
      train(group, at::kCPU, task, options);
    } catch (const NodeFault& fault) {
      EXPECT_EQ(fault.exit_code(), ExitCode::kNodeBad);
      const std::lock_guard lock(mutex);
      EXPECT_TRUE(!stop.came || stop.message == fault.what()) << "every rank says the same";
      stop = {true, -1, fault.what()};
    }
  });
  std::smatch found;
  if (std::regex_search(stop.message, found, std::regex("at step ([0-9]+)"))) stop.step = std::stoll(found[1]);
  return stop;
}

std::vector<json> ledger_of(const std::string& run_dir) {
  std::vector<json> lines;
  std::ifstream file(run_dir + "/ledger.jsonl");
  for (std::string line; std::getline(file, line);) lines.push_back(json::parse(line));
  return lines;
}

TEST(ReplicaWatchTest, OneFlippedBitOfFourReplicasIsFoundInTimeAndItsRankNamed) {
  constexpr int64_t kInterval = 5;
  std::mt19937 random(20261126);
  for (int trial = 0; trial < 20; ++trial) {
    const TempDir dir;
    const Flip which{.rank = static_cast<int>(random() % 4),
                     .step = static_cast<int64_t>(random() % 30),
                     .tensor = random() % 4,
                     .element = static_cast<int64_t>(random() % 32),
                     .bit = static_cast<int>(random() % 32)};
    SCOPED_TRACE("trial " + std::to_string(trial) + ": rank " + std::to_string(which.rank) + " step " +
                 std::to_string(which.step) + " tensor " + std::to_string(which.tensor) + " bit " +
                 std::to_string(which.bit));
    const Stop stop = run_with(4, watched_run(dir.path(), kInterval), which);
    ASSERT_TRUE(stop.came);
    EXPECT_GE(stop.step, which.step);
    EXPECT_LT(stop.step, which.step + kInterval);
    EXPECT_THAT(stop.message, AllOf(HasSubstr(": rank " + std::to_string(which.rank) + " on host "),
                                    HasSubstr("the other 3 replicas agree"), HasSubstr("Mend")));
    const json last = ledger_of(dir.path()).back();
    EXPECT_EQ(last.at("event"), "replica_fault");
    EXPECT_EQ(last.at("ranks"), json::array({which.rank}));
    EXPECT_EQ(last.at("step"), stop.step);
    EXPECT_THAT(last.at("where").get<std::string>(), HasSubstr("bucket"));
  }
}

TEST(ReplicaWatchTest, OfTwoReplicasBothAreNamed) {
  const TempDir dir;
  const Stop stop = run_with(2, watched_run(dir.path(), 3), {.rank = 1, .step = 4, .tensor = 1, .bit = 20});
  ASSERT_TRUE(stop.came);
  EXPECT_THAT(stop.message, AllOf(HasSubstr("rank 0 on host"), HasSubstr("rank 1 on host"), HasSubstr("no majority")));
  EXPECT_EQ(ledger_of(dir.path()).back().at("ranks"), json::array({0, 1}));
}

TEST(ReplicaWatchTest, ABitThatMakesTheLossNotFiniteIsNamedAtOnce) {
  const TempDir dir;
  const Options options = watched_run(dir.path(), 1000);  // its bucket's turn would come after the run
  const Stop stop = run_with(4, options, {.rank = 2, .step = 7, .tensor = 2, .element = 3, .bit = 30});
  ASSERT_TRUE(stop.came);
  EXPECT_EQ(stop.step, 7);
  EXPECT_THAT(stop.message, HasSubstr(": rank 2 on host"));
}

TEST(ReplicaWatchTest, ReplicasOfShardsAreCompared) {
  for (const int stage : {1, 2, 3}) {
    SCOPED_TRACE("stage " + std::to_string(stage));
    const TempDir dir;
    Options options = watched_run(dir.path(), 4);
    options.zero_stage = stage;
    options.zero_shard_size = 1;  // four replicas, each whole
    Flip which{.rank = 3, .step = 6, .tensor = 0, .element = 9, .bit = 12};
    if (stage == 3) which.stays = true;  // what is gathered for a forward is freed after it
    const Stop stop = run_with(4, options, which);
    if (stage == 3) {
      EXPECT_FALSE(stop.came) << "the shard itself is as it was";
      continue;
    }
    ASSERT_TRUE(stop.came);
    EXPECT_THAT(stop.message, HasSubstr(": rank 3 on host"));
  }
}

TEST(ReplicaWatchTest, AStuckBitOfAGatheredWeightIsFoundWhenItsTurnComes) {
  const TempDir dir;
  Options options = watched_run(dir.path(), 4);
  options.zero_stage = 1;
  const Stop stop = run_with(4, options, {.rank = 2, .step = 6, .tensor = 0, .element = 0, .bit = 3, .stays = true});
  ASSERT_TRUE(stop.came);
  EXPECT_LT(stop.step, 10);
  EXPECT_THAT(stop.message, AllOf(HasSubstr(": rank 2 on host"), HasSubstr("weights of 0.weight")));
}

class CleanRunTest : public testing::TestWithParam<int> {};  // ZeRO stage
INSTANTIATE_TEST_SUITE_P(ZeroStages, CleanRunTest, testing::Values(0, 1, 2, 3));

TEST_P(CleanRunTest, FiveHundredChecksRaiseNoFalseAlarm) {
  const TempDir dir;
  Options options = watched_run(dir.path(), 3);
  options.steps = 500;
  options.zero_stage = GetParam();
  if (GetParam() > 0) options.zero_shard_size = 2;
  EXPECT_FALSE(run_with(4, options, {.step = -1}).came);
  EXPECT_EQ(ledger_of(dir.path()).back().at("event"), "end");
}

TEST(ReplicaWatchTest, OffItLetsEverythingPass) {
  const TempDir dir;
  EXPECT_FALSE(run_with(4, watched_run(dir.path(), 0), {.rank = 1, .step = 4, .tensor = 1, .bit = 20}).came);
}

// Ranks 0 and 1 have stage 0, ranks 2 and 3 stage 1; a tied weight is on both.
TEST(ReplicaWatchTest, SetsFollowTheLayoutsOnEveryRankAlike) {
  const auto tensor = [](const std::string& name, const std::vector<int>& sizes) {
    checkpoint::StateTensor state{"weights", {name, {8}, "F32", {}}, {}};
    for (const int size : sizes) state.layout.boxes.push_back({{0}, {size}});
    return state;
  };
  std::vector<std::vector<uint64_t>> digests;
  std::vector<ReplicaWatch> watches;
  for (int rank = 0; rank < 4; ++rank) {
    std::vector<checkpoint::StateTensor> state = {tensor("first", {8, 8, 0, 0}), tensor("second", {0, 0, 8, 8}),
                                                  tensor("tied", {8, 8, 8, 8}), tensor("alone", {0, 8, 0, 0})};
    for (auto& part : state) part.local = at::full({part.layout.boxes[rank].numel()}, 1, at::kFloat);
    if (rank == 2) state[2].local[5] = 2;
    watches.emplace_back(state, rank, 1);
    EXPECT_EQ(watches.back().num_digests(), 2);
    digests.push_back(watches.back().digests(0));
  }
  std::vector<uint64_t> all;
  for (const auto& mine : digests) all.insert(all.end(), mine.begin(), mine.end());
  for (const ReplicaWatch& watch : watches) {
    const auto fault = watch.find_fault(0, all);
    ASSERT_TRUE(fault);
    EXPECT_THAT(fault->suspects, testing::ElementsAre(2));
    EXPECT_EQ(fault->num_holders, 4);
    EXPECT_TRUE(fault->is_certain);
  }
}

}  // namespace
}  // namespace lockstep::train
