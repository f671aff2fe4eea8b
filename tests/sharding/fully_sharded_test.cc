// Units are whole while they are used and gone after, at most two at a time, whatever a rank does itself.
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/fully_sharded.h>

namespace lockstep {
namespace {

constexpr Milliseconds kTimeout{20'000};
constexpr size_t kUnits = 5;

class FullyShardedTest : public testing::TestWithParam<int> {};  // world size
INSTANTIATE_TEST_SUITE_P(WorldSizes, FullyShardedTest, testing::Values(1, 2, 3, 4, 7, 8));

float value_of(size_t unit, size_t parameter, int64_t row) {
  return static_cast<float>(100 * unit + 10 * parameter) + 0.25F * static_cast<float>(row);
}

// Unit 0 lies in no unit and stays; some parameters have fewer rows than there are ranks.
std::vector<ShardedUnit> make_units() {
  std::vector<ShardedUnit> units;
  for (size_t unit = 0; unit < kUnits; ++unit) {
    const auto rows = static_cast<int64_t>(5 + 4 * unit);
    units.push_back({.name = "unit" + std::to_string(unit), .parameters = {at::zeros({rows, 3}), at::zeros({1})}});
  }
  units[0].stays = true;
  return units;
}

// A model of make_units() on one rank.
struct Model {
  explicit Model(ProcessGroup& group) : units(make_units()), sharded(group, units, kTimeout) {
    for (size_t unit = 0; unit < kUnits; ++unit) {
      for (size_t i = 0; i < units[unit].parameters.size(); ++i) {
        const at::Tensor& shard = sharded.shard(unit, i);
        const RowRange rows = row_range(units[unit].parameters[i].size(0), group.rank(), group.size());
        EXPECT_EQ(shard.size(0), rows.count);
        for (int64_t row = 0; row < rows.count; ++row) shard[row].fill_(value_of(unit, i, rows.begin + row));
      }
    }
  }

  bool is_there(size_t unit) const { return units[unit].parameters[0].storage().nbytes() > 0; }
  void expect_whole(size_t unit) const {
    ASSERT_TRUE(is_there(unit)) << "unit " << unit;
    for (size_t i = 0; i < units[unit].parameters.size(); ++i) {
      const at::Tensor& parameter = units[unit].parameters[i];
      for (int64_t row = 0; row < parameter.size(0); ++row)
        EXPECT_TRUE(parameter[row].eq(value_of(unit, i, row)).all().item<bool>()) << unit << " " << i << " " << row;
    }
  }

  void forward() {
    for (size_t unit = 1; unit < kUnits; ++unit) {
      sharded.before_forward(unit);
      expect_whole(unit);
      sharded.after_forward(unit);
      EXPECT_EQ(is_there(unit), unit + 1 == kUnits) << unit << "; the last one's backward comes at once";
    }
  }
  // Up to the first unit that trains; a frozen one in between is read until the next begins.
  void backward(size_t first_trained, size_t frozen) {
    for (size_t unit = kUnits; unit-- > first_trained;) {
      sharded.before_backward(unit);
      expect_whole(unit);
      sharded.after_backward(unit, /*still_read=*/unit == frozen);
      EXPECT_EQ(is_there(unit), unit == frozen) << unit;
      if (unit == frozen) expect_whole(unit);
    }
  }

  std::vector<ShardedUnit> units;
  FullySharded sharded;
};

TEST_P(FullyShardedTest, AUnitIsWholeWhileItIsUsedAndGoneAfter) {
  run_local_ranks(GetParam(), [](ProcessGroup& group) {
    Model model(group);
    for (size_t unit = 0; unit < kUnits; ++unit) EXPECT_FALSE(model.is_there(unit));
    for (int step = 0; step < 3; ++step) {
      model.sharded.begin(/*both=*/true);
      model.expect_whole(0);
      model.forward();
      model.backward(/*first_trained=*/1, /*frozen=*/kUnits);
      model.sharded.end();
      for (size_t unit = 1; unit < kUnits; ++unit) EXPECT_FALSE(model.is_there(unit));
      EXPECT_TRUE(model.is_there(0));
      model.sharded.end_step();
      EXPECT_FALSE(model.is_there(0));
    }
    EXPECT_EQ(model.sharded.max_alive(), 2);
  });
}

TEST_P(FullyShardedTest, FrozenUnitsAreFreedBeforeTheNextOnesBackward) {
  run_local_ranks(GetParam(), [](ProcessGroup& group) {
    Model model(group);
    model.sharded.begin(/*both=*/true);
    model.forward();
    model.backward(/*first_trained=*/1, /*frozen=*/3);
    EXPECT_FALSE(model.is_there(3));
    model.sharded.end();
    EXPECT_EQ(model.sharded.max_alive(), 2);
  });
}

// The last rank has no micro-batch in the second round; all of them gather the same.
TEST_P(FullyShardedTest, ARankWithoutAMicroBatchGathersAsTheOthersDo) {
  for (const size_t first_trained : {1, 3}) {
    for (const size_t frozen : {2, 3, 4, 5}) {
      run_local_ranks(GetParam(), [&](ProcessGroup& group) {
        Model model(group);
        for (int round = 0; round < 3; ++round) {
          model.sharded.begin(/*both=*/true);
          std::vector<size_t> done;
          if (round == 0 || group.rank() + 1 < group.size()) {
            model.forward();
            model.backward(first_trained, frozen);
          } else {
            model.sharded.absent_forward(0);
            model.sharded.absent_backward(0, [&](size_t unit) { done.push_back(unit); });
            EXPECT_EQ(done.size(), kUnits - first_trained);
            EXPECT_EQ(done.front(), kUnits - 1);
          }
          model.sharded.end();
        }
        EXPECT_EQ(model.sharded.max_alive(), 2);
      });
    }
  }
}

TEST(FullyShardedErrorTest, AUnitThatIsCalledTwiceIsNamed) {
  run_local_ranks(2, [](ProcessGroup& group) {
    Model model(group);
    model.sharded.begin(/*both=*/true);
    model.forward();
    try {
      model.sharded.before_forward(2);
      ADD_FAILURE() << "no error";
    } catch (const CheckFailed& error) {
      EXPECT_NE(std::string(error.what()).find("unit2"), std::string::npos) << error.what();
    }
    model.sharded.end();
  });
}

}  // namespace
}  // namespace lockstep
