// What is particular to two levels: what a split makes of them.
#include <string>

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/shm_group.h>

#include "numbers.h"

namespace lockstep {
namespace {

TEST(TwoLevelGroupTest, APartUsesWhatItsRanksHaveInCommon) {
  auto mpi = make_mpi_world();
  const int me = mpi->rank(), size = mpi->size();
  std::vector<int> nodes;
  nodes.reserve(size);
  for (int rank = 0; rank < size; ++rank) nodes.push_back(rank / 2);
  const auto world = make_two_level_group(std::move(mpi), nodes);
  const auto near = world->split(me / 2, me, "near"), far = world->split(me % 2, me, "far"),
             all = world->split(0, -me, "all");
  EXPECT_STREQ(near->backend(), "shm");
  EXPECT_STREQ(far->backend(), far->size() == 1 ? "shm" : "mpi");
  EXPECT_STREQ(all->backend(), size <= 2 ? "shm" : "two_level");
  for (const auto& part : {near.get(), far.get(), all.get()}) {
    at::Tensor x = part->empty_mapped(70'000, at::TensorOptions(at::kFloat)).fill_(me);
    part->all_reduce(x, ReduceOp::kMax).wait();
    at::Tensor most = at::full({1}, me, at::kLong);
    world->barrier();
    part->all_reduce(most, ReduceOp::kMax).wait();
    EXPECT_EQ(difference(x, at::full({70'000}, most.item<int64_t>(), at::kFloat)), "") << part->name();
  }
  for (const auto& part : {near.get(), far.get(), all.get()}) part->close();
  world->close();
}

TEST(TwoLevelGroupTest, ManyOperationsOfManySizesInFlightKeepTheirPlaces) {
  auto mpi = make_mpi_world();
  const int me = mpi->rank(), size = mpi->size();
  std::vector<int> nodes;
  nodes.reserve(size);
  for (int rank = 0; rank < size; ++rank) nodes.push_back(rank % 2);
  const auto world = make_two_level_group(std::move(mpi), nodes);
  std::vector<at::Tensor> tensors;
  std::vector<Work> works;
  for (int i = 0; i < 30; ++i) {
    tensors.push_back(made(i % 3 == 0 ? 100'003 : 11 * i, at::kFloat, [&](int64_t j) { return term(me, i + j); }));
    works.push_back(i % 2 == 0 ? world->all_reduce(tensors.back()) : world->broadcast(tensors.back(), i % size));
  }
  for (int64_t i = 29; i >= 0; --i) {
    works[i].wait();
    const auto wanted = [&](int64_t j) {
      if (i % 2 != 0) return term(static_cast<int>(i % size), i + j);
      int64_t sum = 0;
      for (int rank = 0; rank < size; ++rank) sum += term(rank, i + j);
      return sum;
    };
    EXPECT_EQ(difference(tensors[i], made(tensors[i].numel(), at::kFloat, wanted)), "") << "operation " << i;
  }
  works.clear();
  world->close();
}

}  // namespace
}  // namespace lockstep
