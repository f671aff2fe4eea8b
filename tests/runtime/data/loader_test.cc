#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/data/loader.h>

#include "data_folder.h"

namespace lockstep::data {
namespace {

/// A sample is its own index. Can be slow, or break at one index.
class Indices : public Dataset {
 public:
  explicit Indices(int64_t size, int64_t broken = -1, std::chrono::milliseconds delay = {})
      : size_(size), broken_(broken), delay_(delay) {}
  int64_t size() const override { return size_; }
  Batch get(std::span<const int64_t> indices) const override {
    std::this_thread::sleep_for(delay_);
    at::Tensor ids = at::empty({static_cast<int64_t>(indices.size())}, at::kLong);
    for (size_t i = 0; i < indices.size(); ++i) {
      if (indices[i] == broken_) throw CorruptData("sample " + std::to_string(broken_) + " is broken");
      ids.mutable_data_ptr<int64_t>()[i] = indices[i];
    }
    return {{ids}, static_cast<int64_t>(indices.size())};
  }
  std::string fingerprint() const override { return "indices"; }

 private:
  int64_t size_, broken_;
  std::chrono::milliseconds delay_;
};

std::vector<int64_t> ids_of(const Batch& batch) {
  const auto* ids = batch.tensors[0].const_data_ptr<int64_t>();
  return {ids, ids + batch.tensors[0].numel()};
}

constexpr int64_t kLeaves = 12, kMicroBatch = 3, kSteps = 9, kSize = 101;  // three epochs and more

// The ids of steps [first, last), in leaf order, as `world_size` ranks see them; shares need not be even.
std::vector<int64_t> ids_seen(int world_size, int64_t first, int64_t last, int64_t prefetch) {
  std::vector<std::unique_ptr<TrainingLoader>> ranks;
  for (int64_t rank = 0; rank < world_size; ++rank) {
    std::vector<int64_t> leaves((rank + 1) * kLeaves / world_size - rank * kLeaves / world_size);
    std::iota(leaves.begin(), leaves.end(), rank * kLeaves / world_size);
    ranks.push_back(std::make_unique<TrainingLoader>(std::make_shared<Indices>(kSize),
                                                     LoaderOptions{.seed = 5,
                                                                   .micro_batch_size = kMicroBatch,
                                                                   .num_leaves = kLeaves,
                                                                   .leaves = leaves,
                                                                   .first_step = first,
                                                                   .prefetch_steps = prefetch}));
  }
  std::vector<int64_t> all;
  for (int64_t step = first; step < last; ++step) {
    for (auto& rank : ranks) {
      for (const Batch& batch : rank->next()) {
        const auto ids = ids_of(batch);
        all.insert(all.end(), ids.begin(), ids.end());
      }
    }
  }
  return all;
}

class LoaderTest : public ::testing::TestWithParam<int> {};  // world_size

TEST_P(LoaderTest, EveryStepHoldsTheSameSamplesInTheSameOrderForAnyWorldAndPrefetch) {
  const auto expected = ids_seen(1, 0, kSteps, 1);
  ASSERT_EQ(expected.size(), kSteps * kLeaves * kMicroBatch);
  for (const int64_t prefetch : {1, 2, 7}) EXPECT_EQ(ids_seen(GetParam(), 0, kSteps, prefetch), expected);
}

TEST_P(LoaderTest, ARestartAtAnyStepGoesOnWithTheSameSamples) {
  const auto whole = ids_seen(1, 0, kSteps, 2);
  for (int64_t step = 0; step < kSteps; ++step) {
    auto joined = ids_seen(1, 0, step, 2);  // another world before the restart
    const auto rest = ids_seen(GetParam(), step, kSteps, 2);
    joined.insert(joined.end(), rest.begin(), rest.end());
    EXPECT_EQ(joined, whole) << "restart at step " << step;
  }
}

TEST_P(LoaderTest, AnEvaluationPassHoldsEachSampleOnceOverAllRanks) {
  const int world_size = GetParam();
  for (const int64_t size : {1, 2, 7, 24, 101}) {
    const EvaluationPass pass(std::make_shared<Indices>(size), 8);
    std::vector<int64_t> ids;
    for (int rank = 0; rank < world_size; ++rank) {
      for (int64_t i = rank; i < pass.num_micro_batches(); i += world_size) {
        const Batch batch = pass.get(i);
        const auto all = ids_of(batch);
        EXPECT_EQ(all.size(), 8U) << "padded to one shape";
        ids.insert(ids.end(), all.begin(), all.begin() + batch.valid_samples);
      }
    }
    std::sort(ids.begin(), ids.end());
    std::vector<int64_t> expected(size);
    std::iota(expected.begin(), expected.end(), 0);
    EXPECT_EQ(ids, expected);
  }
}
INSTANTIATE_TEST_SUITE_P(WorldSizes, LoaderTest, ::testing::Values(1, 2, 3, 4, 5, 7, 8));

TEST(LoaderTest, AnErrorOfTheBackgroundThreadReachesTheCallerAfterTheGoodSteps) {
  // In an order of one epoch, the broken sample comes up sooner or later; what was before it is served.
  TrainingLoader loader(std::make_shared<Indices>(50, 13), {.micro_batch_size = 1});
  const auto message = message_of<CorruptData>([&] {
    for (int i = 0; i < 50; ++i) EXPECT_NE(ids_of(loader.next()[0])[0], 13);
  });
  EXPECT_EQ(message, "sample 13 is broken");
  EXPECT_THROW(loader.next(), CorruptData) << "and again, rather than a wait for ever";
}

TEST(LoaderTest, IsDestroyedCleanlyWhileItsThreadIsBusyOrWaits) {
  for (int i = 0; i < 20; ++i) {
    TrainingLoader busy(std::make_shared<Indices>(50, -1, std::chrono::milliseconds(3)), {});
    TrainingLoader waiting(std::make_shared<Indices>(50), {});
    if (i % 2 == 1) busy.next(), waiting.next();
  }
}

TEST(LoaderTest, ImpossibleOptionsAreRefused) {
  const auto make = [](const LoaderOptions& options) { TrainingLoader loader(std::make_shared<Indices>(5), options); };
  EXPECT_THROW(make({.prefetch_steps = 0}), CheckFailed) << "would wait for ever";
  EXPECT_THROW(make({.micro_batch_size = 0}), CheckFailed);
  EXPECT_THROW(make({.num_leaves = 2, .leaves = {1, 2}}), CheckFailed);
  const EvaluationPass pass(std::make_shared<Indices>(5), 2, 3);
  EXPECT_EQ(pass.num_micro_batches(), 2);
  EXPECT_EQ(pass.get(1).valid_samples, 1);
  EXPECT_THROW(pass.get(2), CheckFailed);
}

}  // namespace
}  // namespace lockstep::data
