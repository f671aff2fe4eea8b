#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include <lockstep/base/exact_sum.h>

namespace lockstep {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What gradients look like: exponents over `range` powers of two, zeros among them, a size that divides nothing.
std::vector<float> values_of_range(size_t n, int range, std::mt19937_64& random) {
  std::vector<float> values(n);
  for (float& value : values) {
    const int exponent = static_cast<int>(random() % static_cast<uint64_t>(range)) - range / 2;
    value = random() % 17 == 0 ? 0.0f : std::ldexp(static_cast<float>(random() % 2000) - 1000.0f, exponent);
  }
  return values;
}

ExactSum squares(std::span<const float> values) {
  ExactSum sum;
  sum.add_squares(values);
  return sum;
}

double bits_apart(double a, double b) {
  return std::bit_cast<uint64_t>(a) == std::bit_cast<uint64_t>(b) ? 0 : std::fabs(a - b) / b;
}

class RangeTest : public testing::TestWithParam<int> {};  // powers of two the values spread over

TEST_P(RangeTest, AnyCutAndAnyMergeOrderGivesTheSameBits) {
  std::mt19937_64 random(static_cast<uint64_t>(GetParam()));
  for (const size_t n : {1, 7, 4095, 4097, 20'011}) {
    std::vector<float> values = values_of_range(n, GetParam(), random);
    const double whole = squares(values).value();
    for (int round = 0; round < 20; ++round) {
      std::vector<size_t> cuts = {0, n};
      for (int i = 0; i < 9; ++i) cuts.push_back(random() % (n + 1));
      std::sort(cuts.begin(), cuts.end());
      std::vector<ExactSum> parts;
      for (size_t i = 0; i + 1 < cuts.size(); ++i)
        parts.push_back(squares(std::span(values).subspan(cuts[i], cuts[i + 1] - cuts[i])));
      std::shuffle(parts.begin(), parts.end(), random);
      ExactSum left, pairs;
      for (const ExactSum& part : parts) left.merge(part);
      for (size_t i = 0; i < parts.size(); i += 2) {  // a tree, and a part into a sum that is empty
        ExactSum pair = parts[i];
        if (i + 1 < parts.size()) pair.merge(parts[i + 1]);
        pairs.merge(pair);
      }
      ASSERT_EQ(bits_apart(left.value(), whole), 0) << n << " values";
      ASSERT_EQ(bits_apart(pairs.value(), whole), 0) << n << " values";
      std::shuffle(values.begin(), values.end(), random);
      ASSERT_EQ(bits_apart(squares(values).value(), whole), 0) << "shuffled, " << n << " values";
    }
  }
}

TEST_P(RangeTest, TermByTermIsTheSameSum) {
  std::mt19937_64 random(static_cast<uint64_t>(GetParam()) + 1);
  const std::vector<float> values = values_of_range(5003, GetParam(), random);
  ExactSum terms;
  for (const float value : values) terms.add(static_cast<double>(value) * value);
  EXPECT_EQ(bits_apart(terms.value(), squares(values).value()), 0);
}

TEST_P(RangeTest, IsAsGoodAsFortyBitsOfTheTrueSum) {
  std::mt19937_64 random(static_cast<uint64_t>(GetParam()) + 2);
  const std::vector<float> values = values_of_range(100'003, GetParam(), random);
  __float128 reference = 0;
  for (const float value : values) reference += static_cast<__float128>(value) * value;
  EXPECT_LT(bits_apart(squares(values).value(), static_cast<double>(reference)), 0x1p-40);
}

INSTANTIATE_TEST_SUITE_P(PowersOfTwo, RangeTest, testing::Values(1, 8, 24, 80, 220));

TEST(ExactSumTest, DenormalsAndTheLargestFloatsCount) {
  const float tiny = FLT_TRUE_MIN, huge = FLT_MAX;
  EXPECT_EQ(squares(std::vector<float>(9, tiny)).value(), 9 * 0x1p-298);
  const double square = static_cast<double>(huge) * huge;
  EXPECT_EQ(squares(std::vector<float>(8, huge)).value(), 8 * square);
  EXPECT_EQ(squares(std::vector<float>{huge, tiny, 0}).value(), square);
}

TEST(ExactSumTest, LossesOfBothSignsCancelExactly) {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  std::vector<double> terms;
  for (int i = 0; i < 1001; ++i) {
    terms.push_back(normal(random));
    terms.push_back(-terms.back());
  }
  terms.push_back(0.375);
  for (int round = 0; round < 10; ++round) {
    std::shuffle(terms.begin(), terms.end(), random);
    ExactSum sum;
    for (const double term : terms) sum.add(term);
    EXPECT_EQ(sum.value(), 0.375);
  }
}

TEST(ExactSumTest, TiesAtTheEdgeOfABinDoNotDependOnTheirNeighbours) {
  // 2^39 is half the quantum of bin 1 and the smallest term of that bin; alone, with a lesser and with a greater one.
  for (const double other : {0x1p38, 0x1p39, 0x1p40, 0x1p60, 0x1p79}) {
    ExactSum forward, backward, apart, part;
    forward.add(0x1p39), forward.add(other);
    backward.add(other), backward.add(0x1p39);
    apart.add(0x1p39), part.add(other), apart.merge(part);
    EXPECT_LE(bits_apart(forward.value(), 0x1p39 + other), 0x1p-40);
    EXPECT_EQ(bits_apart(backward.value(), forward.value()), 0);
    EXPECT_EQ(bits_apart(apart.value(), forward.value()), 0);
  }
}

TEST(ExactSumTest, AnEmptySumIsZero) {
  EXPECT_EQ(ExactSum().value(), 0);
  EXPECT_EQ(squares({}).value(), 0);
  EXPECT_EQ(squares(std::vector<float>(5000, 0.0f)).value(), 0);
  ExactSum sum = squares(std::vector<float>{3});
  sum.merge(ExactSum());
  EXPECT_EQ(sum.value(), 9);
}

TEST(ExactSumTest, OneInfOrNanAnywhereIsSeenAndStays) {
  for (const float bad : {kInf, -kInf, kNan, -kNan}) {
    for (const size_t at : {0, 15, 16, 4095, 4096, 5001}) {
      std::vector<float> values(5002, 1.5f);
      values[at] = bad;
      ExactSum sum = squares(values);
      EXPECT_TRUE(sum.has_non_finite()) << bad << " at " << at;
      EXPECT_TRUE(std::isnan(sum.value()));
      ExactSum merged = squares(std::vector<float>{1});
      EXPECT_FALSE(merged.has_non_finite());
      merged.merge(sum);
      EXPECT_TRUE(merged.has_non_finite());
    }
    ExactSum sum;
    sum.add(bad);
    EXPECT_TRUE(sum.has_non_finite());
  }
}

TEST(ExactSumTest, TravelsAsBytes) {
  static_assert(std::is_trivially_copyable_v<ExactSum> && sizeof(ExactSum) == 48);
  const ExactSum sent = squares(std::vector<float>{1, 2, 3});
  ExactSum received;
  std::memcpy(&received, &sent, sizeof(sent));
  EXPECT_EQ(received.value(), 14);
}

}  // namespace
}  // namespace lockstep
