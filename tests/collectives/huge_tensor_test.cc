// Tensors of more elements than a C int counts, which MPI's calls take. Needs 12 GB on one machine.
#include <algorithm>

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <lockstep/collectives/mpi_group.h>

namespace lockstep {
namespace {

constexpr int64_t kNumel = (int64_t{1} << 31) + 2002;

uint8_t element(int rank, int64_t i) { return static_cast<uint8_t>((i + i / 251 + int64_t{100} * rank) % 251); }

void fill(const at::Tensor& x, int rank, int64_t begin, int64_t end) {
  auto* data = x.mutable_data_ptr<uint8_t>();
  for (int64_t i = begin; i < end; ++i) data[i] = element(rank, i);
}

template <typename Wanted>
int64_t first_wrong(const at::Tensor& x, Wanted wanted) {
  const auto* data = x.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    if (data[i] != wanted(i)) return i;
  }
  return -1;
}

TEST(HugeTensorTest, TravelsWholeAndInPlace) {
  const auto world = make_mpi_world();
  EXPECT_EQ(world->size(), 2);
  const int me = world->rank();
  at::Tensor x = at::empty({kNumel}, at::kByte);
  fill(x, me, 0, kNumel);
  world->all_reduce(x, ReduceOp::kMax).wait();
  EXPECT_EQ(first_wrong(x, [](int64_t i) { return std::max(element(0, i), element(1, i)); }), -1) << "all_reduce";

  fill(x, me, 0, kNumel);
  world->broadcast(x, 1).wait();
  EXPECT_EQ(first_wrong(x, [](int64_t i) { return element(1, i); }), -1) << "broadcast";

  x.zero_();
  const int64_t counts[] = {kNumel - 1001, 1001}, begin = me == 0 ? 0 : counts[0];
  fill(x, me, begin, begin + counts[me]);
  world->all_gather_uneven(x, x.narrow(0, begin, counts[me]), counts).wait();
  EXPECT_EQ(first_wrong(x, [&](int64_t i) { return element(i < counts[0] ? 0 : 1, i); }), -1) << "all_gather";
  world->close();
}

}  // namespace
}  // namespace lockstep
