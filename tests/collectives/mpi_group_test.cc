// What is particular to MPI.
#include <functional>
#include <string>

#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/mpi_group.h>

#include "numbers.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no Error";
}

TEST(MpiGroupTest, DtypesMpiHasNoTypeForAreRefusedByName) {
  const auto world = make_mpi_world();
  EXPECT_THAT(refusal([&] { world->all_reduce(at::full({2}, 1, at::kShort)).wait(); }), HasSubstr("Short"));
  world->close();
}

TEST(MpiGroupTest, TagsOutsideTheirRangeAreRefused) {
  const auto world = make_mpi_world();
  for (const int tag : {-1, 1 << 20}) {
    EXPECT_THAT(refusal([&] { world->send(at::full({2}, 1, at::kFloat), 0, tag); }), HasSubstr("tag"));
    EXPECT_THAT(refusal([&] { world->recv(at::full({2}, 1, at::kFloat), 0, tag); }), HasSubstr("tag"));
  }
  world->close();
}

TEST(MpiGroupTest, AnAbandonedOperationBreaksItsGroupAndNoOtherAndItsTensorStays) {
  const auto world = make_mpi_world(), part = make_mpi_world();
  const at::Tensor letter = at::full({100}, 3, at::kFloat);
  const int before = (world->rank() + world->size() - 1) % world->size();
  { const Work abandoned = part->recv(letter, before, 1); }
  EXPECT_GT(letter.use_count(), 1U) << "MPI may still write there, so somebody must hold it";
  EXPECT_THAT(refusal([&] { part->barrier(); }), HasSubstr("unusable"));
  at::Tensor x = at::full({1}, 1, at::kFloat);
  world->all_reduce(x).wait();
  EXPECT_EQ(difference(x, at::full({1}, world->size(), at::kFloat)), "");
  part->close();
  world->close();
}

TEST(MpiGroupTest, CallsThatAreComparedHaveADeadlineToo) {
  const auto world = make_mpi_world(), checked = make_mpi_world({.check_collectives = true});
  if (world->rank() > 0) {
    EXPECT_THAT(
        refusal([&] { checked->all_reduce(at::full({2}, 1, at::kFloat), ReduceOp::kSum, Milliseconds(60)).wait(); }),
        testing::AllOf(HasSubstr("comparing all_reduce"), HasSubstr("timed out after 60 ms")));
  }
  world->barrier();
  checked->abort();
  checked->close();
  world->close();
}

}  // namespace
}  // namespace lockstep
