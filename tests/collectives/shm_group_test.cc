// What is particular to shared memory.
#include <functional>
#include <string>

#include <sys/resource.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/memory_count.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/shm_group.h>

#include "numbers.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

const at::TensorOptions kFloats(at::kFloat);

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no Error";
}

int64_t sum_of_terms(int ranks, int64_t i) {
  int64_t sum = 0;
  for (int rank = 0; rank < ranks; ++rank) sum += term(rank, i);
  return sum;
}

TEST(ShmGroupTest, MoreMayBeInFlightThanThereAreSlots) {
  const auto world = make_shm_group(make_mpi_world());
  std::vector<at::Tensor> tensors;
  std::vector<Work> works;
  for (int64_t i = 0; i < 100; ++i) {
    const int64_t numel = i % 5 == 0 ? 50'003 : i;
    tensors.push_back(i % 2 == 0 ? world->empty_mapped(numel, kFloats) : at::empty({numel}, at::kFloat));
    tensors.back().copy_(made(numel, at::kFloat, [&](int64_t j) { return term(world->rank(), i + j); }));
    works.push_back(world->all_reduce(tensors.back()));
  }
  for (int64_t i = 99; i >= 0; --i) {
    works[i].wait();
    EXPECT_EQ(difference(tensors[i], made(tensors[i].numel(), at::kFloat,
                                          [&](int64_t j) { return sum_of_terms(world->size(), i + j); })),
              "")
        << "operation " << i;
  }
  works.clear();
  world->close();
}

TEST(ShmGroupTest, RanksThatShareACoreDoNotSleepBetweenQuickCalls) {
  const auto world = make_shm_group(make_mpi_world());
  const auto times_asleep = [] {
    rusage usage{};
    ::getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;  // those of sched_yield() are not voluntary
  };
  const at::Tensor one = at::full({1}, 1, kFloats);
  const auto before = times_asleep();
  for (int i = 0; i < 500; ++i) world->all_reduce(one).wait();
  EXPECT_LT(times_asleep() - before, 200);
  world->close();
}

TEST(ShmGroupTest, MappedMemoryCountsAsOfTheKindThatWasInForce) {
  const auto world = make_shm_group(make_mpi_world());
  const auto bytes = [](MemoryKind kind) { return memory_in_use(kind).current_bytes; };
  const int64_t gradients = bytes(MemoryKind::kGradients), scratch = bytes(MemoryKind::kScratch);
  {
    at::Tensor sum;
    {
      const MemoryScope memory(MemoryKind::kGradients);
      sum = world->empty_mapped(50'003, kFloats);
    }
    const MemoryScope memory(MemoryKind::kScratch);
    EXPECT_EQ(bytes(MemoryKind::kGradients), gradients + 4 * 50'003);
    const auto part = sum.narrow(0, 1, 2);
    sum.reset();
    EXPECT_EQ(bytes(MemoryKind::kGradients), gradients + 4 * 50'003) << "a view keeps it";
  }
  EXPECT_EQ(bytes(MemoryKind::kGradients), gradients);
  EXPECT_EQ(bytes(MemoryKind::kScratch), scratch);
  world->close();
}

TEST(ShmGroupTest, LargeTensorsOfAnyMemoryAndAlignmentAreSummed) {
  const auto world = make_shm_group(make_mpi_world());
  constexpr int64_t kNumel = 1'300'021;  // more than is written past the caches, and no multiple of anything
  for (const int64_t offset : {0, 1, 7}) {
    for (const int64_t is_mapped : {0, 1, 2}) {  // on no rank, on all, on every other
      const bool mine = is_mapped == 1 || (is_mapped == 2 && world->rank() % 2 == 0);
      const at::Tensor all = mine ? world->empty_mapped(kNumel + 7, kFloats) : at::empty({kNumel + 7}, at::kFloat);
      const at::Tensor x = all.fill_(-1).narrow(0, offset, kNumel);
      x.copy_(made(kNumel, at::kFloat, [&](int64_t i) { return term(world->rank(), i); }));
      world->all_reduce(x).wait();
      EXPECT_EQ(difference(x, made(kNumel, at::kFloat, [&](int64_t i) { return sum_of_terms(world->size(), i); })), "")
          << "offset " << offset << ", mapped " << is_mapped;
      for (int64_t i = 0; i < 7; ++i)
        EXPECT_EQ(all.const_data_ptr<float>()[i < offset ? i : kNumel + i], -1) << "beside the tensor";
      world->barrier();
    }
  }
  world->close();
}

TEST(ShmGroupTest, ARingIsNotFilledAgainBeforeAllHaveTakenFromIt) {  // a matter of time: hence the repetitions
  const auto world = make_shm_group(make_mpi_world(), {.round_bytes = int64_t{64} << 10});
  constexpr int64_t kNumel = 1'300'021;
  const at::Tensor mine = made(kNumel, at::kFloat, [&](int64_t i) { return term(world->rank(), i); });
  const at::Tensor wanted = made(kNumel, at::kFloat, [&](int64_t i) { return sum_of_terms(world->size(), i); });
  at::Tensor x = at::empty_like(mine);
  int wrong = 0;
  for (int repetition = 0; repetition < 30; ++repetition) {
    x.copy_(mine);
    world->all_reduce(x).wait();
    wrong += x.equal(wanted) ? 0 : 1;
  }
  EXPECT_EQ(wrong, 0);
  world->close();
}

TEST(ShmGroupTest, MappedMemoryIsGivenOutAgainAndNeverTwice) {
  const auto world = make_shm_group(make_mpi_world());
  std::vector<at::Tensor> held;
  for (int64_t i = 0; i < 50; ++i) held.push_back(world->empty_mapped(i * 100, kFloats).fill_(i));
  const void* place = held[20].const_data_ptr();
  held[20].reset();
  held[20] = world->empty_mapped(2000, kFloats).fill_(20);
  EXPECT_EQ(held[20].const_data_ptr(), place);
  for (int64_t i = 0; i < 50; ++i) EXPECT_TRUE(held[i].eq(i).all().item<bool>()) << i;
  for (int64_t i = 0; i < 50; i += 2) held[i].reset();
  for (int64_t i = 0; i < 50; i += 2) held[i] = world->empty_mapped(i * 130, kFloats).fill_(i);
  for (int64_t i = 0; i < 50; ++i) EXPECT_TRUE(held[i].eq(i).all().item<bool>()) << i;
  world->close();
}

TEST(ShmGroupTest, ATensorOutlivesItsGroupAndEveryGroupOfTheNodeReachesIt) {
  at::Tensor x;
  {
    const auto world = make_shm_group(make_mpi_world());
    const auto part = world->split(world->rank() / 2, 0, "part");
    x = part->empty_mapped(100'000, kFloats).fill_(1);
    world->all_reduce(x).wait();
    EXPECT_TRUE(x.eq(world->size()).all().item<bool>());
    part->close();
    world->close();
  }
  x.fill_(5);
  EXPECT_EQ(x.sum().item<float>(), 500'000);
}

TEST(ShmGroupTest, AnAbandonedOperationBreaksItsGroupAndNoOther) {
  const auto world = make_shm_group(make_mpi_world()), part = world->split(0, world->rank(), "part");
  const at::Tensor x = at::full({100'000}, 3, at::kFloat);
  if (world->rank() > 0) {
    { const Work abandoned = part->all_reduce(x); }  // rank 0 stays away
    EXPECT_THAT(refusal([&] { part->barrier(); }), HasSubstr("unusable"));
  }
  at::Tensor one = at::full({1}, 1, at::kFloat);
  world->all_reduce(one).wait();
  EXPECT_EQ(difference(one, at::full({1}, world->size(), at::kFloat)), "");
  part->abort();
  part->close();
  world->close();
}

TEST(ShmGroupTest, AnAllToAllWhoseCountsDisagreeNamesBothRanks) {
  const auto world = make_shm_group(make_mpi_world()), part = world->split(world->rank() < 2 ? 0 : 1, 0, "part");
  if (part->size() == 2 && world->rank() < 2) {
    const std::vector<int64_t> expected{2, 2};  // rank 0 sends 3, rank 1 expects 2
    const std::vector<int64_t> sent{2, world->rank() == 0 ? 3 : 2};
    const at::Tensor in = at::full({sent[0] + sent[1]}, 1, at::kFloat), out = at::full({4}, 1, at::kFloat);
    const std::string message = refusal([&] { part->all_to_all(out, in, expected, sent, Milliseconds(60)).wait(); });
    EXPECT_THAT(message, HasSubstr(world->rank() == 1 ? "rank 0 sends 3 elements to rank 1, which expects 2" : ""));
  }
  world->barrier();
  part->abort();
  part->close();
  world->close();
}

TEST(ShmGroupTest, DtypesThatDoNotTravelAreRefusedByName) {
  const auto world = make_shm_group(make_mpi_world());
  EXPECT_THAT(refusal([&] { world->all_reduce(at::full({2}, 1, at::kShort)).wait(); }), HasSubstr("Short"));
  world->close();
}

TEST(ShmGroupTest, RanksOfThisMachineKnowThatTheyShareANode) {
  const auto world = make_mpi_world();
  EXPECT_EQ(node_of_ranks(*world), std::vector<int>(world->size(), 0));
  world->close();
}

}  // namespace
}  // namespace lockstep
