#include <cmath>
#include <set>

#include <gtest/gtest.h>

#include <lockstep/base/counter_random.h>

namespace lockstep {
namespace {

using Block = std::array<uint32_t, 4>;

// Source: Random123 1.14.0, tests/kat_vectors, lines "philox4x32 10".
TEST(PhiloxTest, AgreesWithThePublishedVectors) {
  EXPECT_EQ(philox4x32(0, 0, 0), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32(~0ull, ~0ull, ~0ull), (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32(0x299f31d0a4093822ull, 0x85a308d3243f6a88ull, 0x0370734413198a2eull),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(StreamKeyTest, NamesSeedsAndNumbersMakeStreamsOfTheirOwn) {
  const std::set<uint64_t> keys = {stream_key(1, "a"),  stream_key(1, "b"), stream_key(2, "a"),     stream_key(1, ""),
                                   stream_key(1, 1),    stream_key(1, 2),   stream_key(1, 1, 1),    stream_key(1, 2, 1),
                                   stream_key(1, 1, 2), stream_key(2, 1),   stream_key(1, 1, 1, 1), stream_key(0, 0)};
  EXPECT_EQ(keys.size(), 12u);
}

TEST(StreamKeyTest, StaysWhatItWas) {  // a change would change the initial weights of every model
  EXPECT_EQ(stream_key(1, "blocks.0.attention.weight"), 10479545692705107387u);
  EXPECT_EQ(stream_key(1, 2, 3, 4), 15374388949593934587u);
}

TEST(UniformTest, LiesInTheHalfOpenUnitIntervalAndIsEven) {
  constexpr int kCount = 100'000;
  const uint64_t key = stream_key(7, "uniform");
  double sum = 0, squares = 0;
  for (int i = 0; i < kCount; ++i) {
    const float x = uniform_at(key, static_cast<uint64_t>(i));
    ASSERT_TRUE(x >= 0 && x < 1) << x;
    sum += x, squares += static_cast<double>(x) * x;
  }
  EXPECT_NEAR(sum / kCount, 1.0 / 2, 5 * std::sqrt(1.0 / 12 / kCount));
  EXPECT_NEAR(squares / kCount, 1.0 / 3, 0.005);
}

TEST(NormalTest, HasTheMomentsOfAStandardNormal) {
  constexpr int kCount = 200'000;
  const uint64_t key = stream_key(7, "normal");
  double moments[5] = {}, neighbours = 0;
  for (int i = 0; i < kCount; ++i) {
    const double x = normal_at(key, static_cast<uint64_t>(i));
    ASSERT_TRUE(std::isfinite(x));
    for (int k = 1; k < 5; ++k) moments[k] += std::pow(x, k) / kCount;
    neighbours += x * normal_at(key, static_cast<uint64_t>(i) ^ 1) / kCount;  // cosine and sine of one angle
  }
  EXPECT_NEAR(moments[1], 0, 0.012);  // five standard errors each
  EXPECT_NEAR(moments[2], 1, 0.016);
  EXPECT_NEAR(moments[3], 0, 0.044);
  EXPECT_NEAR(moments[4], 3, 0.11);
  EXPECT_NEAR(neighbours, 0, 0.016);
}

TEST(NormalTest, AnyPieceOfAStreamIsThatPieceOfTheWhole) {
  const uint64_t key = stream_key(7, "pieces");
  std::array<float, 31> whole{};
  for (size_t i = 0; i < whole.size(); ++i) whole[i] = normal_at(key, i);
  for (size_t i = whole.size(); i-- > 0;) EXPECT_EQ(normal_at(key, i), whole[i]);
  EXPECT_NE(normal_at(key, 0), normal_at(key, uint64_t{1} << 33)) << "an index of more than 32 bits counts in full";
}

}  // namespace
}  // namespace lockstep
