// What is particular to ranks that are threads: how a world of them ends when one fails.
#include <atomic>

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>

namespace lockstep {
namespace {

TEST(RunLocalRanksTest, TheFirstExceptionComesOutAndEndsRanksThatWait) {
  std::atomic<int> freed = 0;
  try {
    run_local_ranks(4, [&](ProcessGroup& group) {
      if (group.rank() == 2) throw CorruptData("rank 2 has had enough");
      try {
        group.barrier();
      } catch (const CollectiveError&) {
        ++freed;
        throw;
      }
    });
    ADD_FAILURE() << "nothing was thrown";
  } catch (const CorruptData& error) {
    EXPECT_STREQ(error.what(), "rank 2 has had enough");
  }
  EXPECT_EQ(freed, 3);
}

TEST(RunLocalRanksTest, RanksThatWaitInAPartOfTheWorldAreFreedToo) {
  EXPECT_THROW(run_local_ranks(4,
                               [](ProcessGroup& world) {
                                 const auto half = world.split(world.rank() % 2, 0, "half");
                                 const auto same = half->split(0, 0, "the same again");
                                 if (world.rank() == 1) throw CorruptData("gone");
                                 same->barrier();
                                 same->barrier();
                                 world.barrier();
                               }),
               CorruptData);
}

TEST(RunLocalRanksTest, EachRankHasOneThread) {
  run_local_ranks(3, [](ProcessGroup&) { EXPECT_EQ(at::get_num_threads(), 1); });
}

TEST(LocalGroupTest, AnAbortedWorldIsNotSplit) {
  const auto groups = make_local_world(1);
  groups[0]->abort();
  EXPECT_THROW(groups[0]->split(0, 0, "too late"), CollectiveError);
}

TEST(LocalGroupTest, AnAllToAllWhoseCountsDisagreeNamesBothRanks) {
  run_local_ranks(2, [](ProcessGroup& group) {
    const std::vector<int64_t> sent{2, group.rank() == 0 ? 3 : 2}, expected{2, 2};  // rank 0 sends 3, rank 1 expects 2
    at::Tensor in = at::full({sent[0] + sent[1]}, 1, at::kFloat), out = at::full({4}, 1, at::kFloat);
    std::string message;
    try {
      group.all_to_all(out, in, expected, sent).wait();
    } catch (const ShapeMismatch& error) {
      message = error.what();
    }
    EXPECT_EQ(message, group.rank() == 0 ? "" : "all_to_all: rank 0 sends 3 elements to rank 1, which expects 2");
  });
}

}  // namespace
}  // namespace lockstep
