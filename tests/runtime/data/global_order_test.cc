#include <numeric>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/data/global_order.h>

namespace lockstep::data {
namespace {

std::vector<int64_t> epoch_of(const GlobalOrder& order, int64_t size, int64_t epoch) {
  std::vector<int64_t> samples(size);
  for (int64_t i = 0; i < size; ++i) samples[i] = order.sample_at(epoch * size + i);
  return samples;
}

TEST(GlobalOrderTest, EveryEpochHoldsEachSampleOnceForEverySize) {
  for (int64_t size = 1; size <= 2000; ++size) {
    const GlobalOrder order(size, 7);
    std::vector<bool> seen(size);
    for (const int64_t sample : epoch_of(order, size, size % 5)) {
      ASSERT_TRUE(sample >= 0 && sample < size) << "size " << size;
      ASSERT_FALSE(seen[sample]) << "size " << size << " has " << sample << " twice";
      seen[sample] = true;
    }
  }
}

TEST(GlobalOrderTest, BigSizesStayInRangeWithoutRepeats) {
  for (const int64_t size : {int64_t{1} << 20, (int64_t{1} << 31) + 11, (int64_t{1} << 40) - 1, int64_t{1} << 55}) {
    const GlobalOrder order(size, 3);
    std::set<int64_t> seen;
    for (int64_t i = 0; i < 20000; ++i) {
      const int64_t sample = order.sample_at(i);
      ASSERT_TRUE(sample >= 0 && sample < size);
      ASSERT_TRUE(seen.insert(sample).second) << sample << " twice among " << size;
    }
  }
}

TEST(GlobalOrderTest, EpochsAndSeedsDiffer) {
  constexpr int64_t kSize = 1000;
  const GlobalOrder order(kSize, 1), other(kSize, 2), same(kSize, 1);
  EXPECT_NE(epoch_of(order, kSize, 0), epoch_of(order, kSize, 1));
  EXPECT_NE(epoch_of(order, kSize, 0), epoch_of(other, kSize, 0));
  EXPECT_EQ(epoch_of(order, kSize, 3), epoch_of(same, kSize, 3));
}

TEST(GlobalOrderTest, SamplesAreSpreadEvenlyOverPositions) {
  // Over many epochs the sample at one position is near uniform: chi-square of 30 cells, 99.99 % below 65.
  constexpr int64_t kSize = 30, kEpochs = 3000;
  const GlobalOrder order(kSize, 11);
  for (const int64_t position : {0, 1, 29}) {
    std::vector<double> count(kSize);
    for (int64_t epoch = 0; epoch < kEpochs; ++epoch) count[order.sample_at(epoch * kSize + position)] += 1;
    double chi_square = 0;
    for (const double c : count) chi_square += (c - 100) * (c - 100) / 100;
    EXPECT_LT(chi_square, 65) << "position " << position;
  }
}

TEST(GlobalOrderTest, RefusesNoSamplesAndNegativePositions) {
  EXPECT_THROW(GlobalOrder(0, 1), CheckFailed);
  EXPECT_THROW(GlobalOrder(5, 1).sample_at(-1), CheckFailed);
}

}  // namespace
}  // namespace lockstep::data
