// The promise of ordered reduction: the bits of one canonical tree, whoever holds the leaves.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/collectives/ordered_reduction.h>

#include "worlds.h"

namespace lockstep {
namespace {

using Leaf = std::function<float(int64_t leaf, int64_t element)>;

// Numbers of many magnitudes, so that almost every order of adding has bits of its own.
float rough(int64_t leaf, int64_t element) {
  const double u =
      uniform_at(stream_key(11, "leaves"), static_cast<uint64_t>(leaf) << 32 | static_cast<uint64_t>(element));
  return static_cast<float>((u - 0.5) * std::exp2(static_cast<double>((leaf * 5 + element * 3) % 17)));
}

// The definition, and nothing else: leaves [begin, begin + n), split at the largest power of two below n.
float canonical_sum(const Leaf& leaf, int64_t element, int64_t begin, int64_t n) {
  if (n == 1) return leaf(begin, element);
  int64_t half = 1;
  while (half * 2 < n) half *= 2;
  return canonical_sum(leaf, element, begin, half) + canonical_sum(leaf, element, begin + half, n - half);
}

float left_to_right(const Leaf& leaf, int64_t element, int64_t n) {
  float sum = leaf(0, element);
  for (int64_t i = 1; i < n; ++i) sum += leaf(i, element);
  return sum;
}

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }

at::Tensor vector_of(int64_t numel, const std::function<float(int64_t)>& element) {
  at::Tensor x = at::empty({numel}, at::kFloat);
  auto* data = x.mutable_data_ptr<float>();
  for (int64_t i = 0; i < numel; ++i) data[i] = element(i);
  return x;
}

std::vector<at::Tensor> my_leaves(const ProcessGroup& group, int64_t num_leaves, int64_t numel, const Leaf& leaf) {
  std::vector<at::Tensor> leaves;
  const LeafShare share = leaf_share(num_leaves, group.rank(), group.size());
  for (int64_t i = share.begin; i < share.end; ++i)
    leaves.push_back(vector_of(numel, [&](int64_t element) { return leaf(i, element); }));
  return leaves;
}

class OrderedAllReduceTest : public testing::TestWithParam<World> {};

TEST_P(OrderedAllReduceTest, HasTheBitsOfTheCanonicalTreeForAnyNumberOfLeaves) {
  run_ranks(GetParam(), [](ProcessGroup& group) {
    for (int64_t n = 1; n <= 17; ++n) {  // fewer leaves than ranks, as many, more, powers of two and not
      std::vector<int64_t> sizes{1, 50, int64_t{16} * group.size(), 501};
      if (n == 7) sizes.push_back(int64_t{2500} * group.size());  // pieces larger than what is folded at a time
      for (const int64_t numel : sizes) {
        const at::Tensor sum =
            ordered_all_reduce(group, n, my_leaves(group, n, numel, rough), numel, at::TensorOptions(at::kFloat));
        ASSERT_EQ(sum.numel(), numel);
        int64_t wrong = 0;
        for (int64_t i = 0; i < numel; ++i)
          wrong += bits(sum.const_data_ptr<float>()[i]) != bits(canonical_sum(rough, i, 0, n));
        EXPECT_EQ(wrong, 0) << n << " leaves of " << numel << " on rank " << group.rank() << " of " << group.size();
      }
    }
  });
}

TEST(OrderOfAddingTest, IsVisibleInTheseNumbers) {  // else the test above could not fail
  for (int64_t n = 4; n <= 17; ++n) {
    int64_t different = 0;
    for (int64_t i = 0; i < 200; ++i)
      different += bits(left_to_right(rough, i, n)) != bits(canonical_sum(rough, i, 0, n));
    EXPECT_GT(different, 20) << n << " leaves";
  }
}

TEST_P(OrderedAllReduceTest, KeepsNegativeZeroAndCarriesWhatIsNotFinite) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  run_ranks(GetParam(), [&](ProcessGroup& group) {
    for (const int64_t n : {1, 2, 3, 8, 13}) {
      const auto leaf = [&](int64_t i, int64_t element) -> float {
        if (element == 1) return i == n - 1 ? inf : 1.0F;
        if (element == 2) return i == n / 2 ? nan : 1.0F;
        if (element == 3) return i == 0 ? -inf : inf;
        if (element == 4) return std::numeric_limits<float>::denorm_min();
        return -0.0F;
      };
      const at::Tensor sum =
          ordered_all_reduce(group, n, my_leaves(group, n, 5, leaf), 5, at::TensorOptions(at::kFloat));
      const auto* value = sum.const_data_ptr<float>();
      EXPECT_EQ(bits(value[0]), bits(-0.0F)) << n << " leaves: no zero of its own may be added";
      EXPECT_EQ(value[1], inf);
      EXPECT_TRUE(std::isnan(value[2]));
      EXPECT_TRUE(n == 1 ? value[3] == -inf : std::isnan(value[3]));
      EXPECT_EQ(bits(value[4]), n) << "denormal numbers are kept";
    }
  });
}

// Each rank owns half of what the ranks before it left: sizes of every kind, the last rank the odd rest.
std::vector<Piece> halving_pieces(int64_t numel, int size) {
  std::vector<Piece> pieces;
  for (int64_t offset = 0; pieces.size() < static_cast<size_t>(size); offset += pieces.back().numel) {
    const bool last = pieces.size() + 1 == static_cast<size_t>(size);
    pieces.push_back({offset, last ? numel - offset : (numel - offset) / 2});
  }
  return pieces;
}

TEST_P(OrderedAllReduceTest, ReducesSeveralBucketsAtOnceToTheirOwnersAndLeavesTheRootsAlone) {
  run_ranks(GetParam(), [](ProcessGroup& group) {
    const int64_t n = 11, sizes[] = {7, 100, 1000};
    const auto blocks = maximal_aligned_blocks(leaf_share(n, group.rank(), group.size()));
    std::vector<OrderedReduction> reductions;
    std::vector<std::vector<at::Tensor>> sent;
    for (const int64_t numel : sizes) {
      std::vector<at::Tensor> roots;
      roots.reserve(blocks.size());
      for (const LeafBlock& block : blocks) {
        roots.push_back(
            vector_of(numel, [&](int64_t i) { return canonical_sum(rough, i + numel, block.start, block.size); }));
      }
      sent.push_back(roots);
      reductions.emplace_back(group, n, roots, halving_pieces(numel, group.size()), at::TensorOptions(at::kFloat));
    }
    for (size_t bucket = reductions.size(); bucket-- > 0;) {
      const int64_t numel = sizes[bucket];
      const Piece own = halving_pieces(numel, group.size())[group.rank()];
      const at::Tensor piece = at::full({own.numel}, 3, at::kFloat);
      while (!reductions[bucket].poll()) {
      }
      reductions[bucket].finish(piece);
      for (int64_t i = 0; i < own.numel; ++i) {
        EXPECT_EQ(bits(piece.const_data_ptr<float>()[i]), bits(canonical_sum(rough, own.offset + i + numel, 0, n)))
            << "bucket of " << numel << ", element " << own.offset + i;
      }
      for (size_t root = 0; root < blocks.size(); ++root) {
        for (int64_t i = 0; i < numel; ++i) {
          ASSERT_EQ(bits(sent[bucket][root].const_data_ptr<float>()[i]),
                    bits(canonical_sum(rough, i + numel, blocks[root].start, blocks[root].size)));
        }
      }
    }
  });
}

TEST_P(OrderedAllReduceTest, RefusesLeavesThatAreNoShare) {
  run_ranks(GetParam(), [](ProcessGroup& group) {
    const at::TensorOptions f32(at::kFloat);
    std::vector<at::Tensor> one_too_many(leaf_share(9, group.rank(), group.size()).count() + 1,
                                         at::full({4}, 1, at::kFloat));
    EXPECT_THROW(ordered_all_reduce(group, 9, one_too_many, 4, f32), CheckFailed);
    EXPECT_THROW(OrderedReduction(group, 1024, one_too_many, even_pieces(4, group.size()), f32), CheckFailed);
    EXPECT_THROW(OrderedReduction(group, 0, {}, even_pieces(4, group.size()), f32), CheckFailed)
        << "the sum of nothing";
  });
}

INSTANTIATE_TEST_SUITE_P(Worlds, OrderedAllReduceTest, testing::ValuesIn(worlds()), testing::PrintToStringParamName());

}  // namespace
}  // namespace lockstep
