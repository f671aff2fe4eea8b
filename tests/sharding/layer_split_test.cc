#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/layer_split.h>

namespace lockstep {
namespace {

using testing::HasSubstr;

double dearest(const std::vector<double>& costs, const LayerSplit& split) {
  double most = 0;
  for (int part = 0; part < static_cast<int>(split.size()); ++part) {
    double sum = 0;
    for (int64_t i = layers_of_part(split, part).begin; i < layers_of_part(split, part).end; ++i) sum += costs[i];
    most = std::max(most, sum);
  }
  return most;
}

// The oracle: all ways to cut.
double least_dearest(const std::vector<double>& costs, size_t begin, int num_parts) {
  double sum = 0, best = 1e300;
  for (size_t end = begin + 1; end <= costs.size(); ++end) {
    sum += costs[end - 1];
    if (num_parts == 1 ? end == costs.size() : true) {
      const double rest = num_parts == 1 ? 0 : least_dearest(costs, end, num_parts - 1);
      best = std::min(best, std::max(sum, rest));
    }
  }
  return best;
}

TEST(LayerSplitTest, TheDearestPartIsAsCheapAsAnyCutMakesIt) {
  uint64_t state = 1;
  for (int round = 0; round < 60; ++round) {
    std::vector<double> costs;
    for (int i = 0; i < 1 + round % 9; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      costs.push_back(static_cast<double>((state >> 33) % 8));  // zeros too
    }
    for (int parts = 1; parts <= static_cast<int>(costs.size()); ++parts) {
      const LayerSplit split = split_layers(costs, parts);
      ASSERT_EQ(split.size(), static_cast<size_t>(parts));
      EXPECT_EQ(layers_of_part(split, parts - 1).end, static_cast<int64_t>(costs.size()));
      for (const int64_t count : split) EXPECT_GT(count, 0);
      EXPECT_EQ(dearest(costs, split), least_dearest(costs, 0, parts)) << testing::PrintToString(costs);
    }
  }
}

TEST(LayerSplitTest, EqualLayersAreSpreadEvenly) {
  EXPECT_THAT(split_layers(std::vector<double>(10, 1.0), 4), testing::UnorderedElementsAre(3, 3, 2, 2));
  EXPECT_EQ(split_layers(std::vector<double>{1, 1, 1, 1, 4}, 2), (LayerSplit{4, 1}));
}

TEST(LayerSplitTest, MorePartsThanLayersNeedAPersonsWord) {
  try {
    split_layers(std::vector<double>{1, 1}, 3);
    ADD_FAILURE() << "not refused";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("2 layers. Mend: fewer stages or chunks, or say which parts are empty: 1,1,0"));
  }
}

TEST(LayerSplitTest, AWrittenSplitIsTakenAsItIs) {
  EXPECT_EQ(parse_layer_split("3,4,4,1", 12, 4), (LayerSplit{3, 4, 4, 1}));
  EXPECT_EQ(parse_layer_split("0,12,0", 12, 3), (LayerSplit{0, 12, 0}));
  EXPECT_EQ(parse_layer_split("12", 12, 1), (LayerSplit{12}));
}

TEST(LayerSplitTest, AWrongSplitIsRefusedWithOneThatWouldDo) {
  for (const auto& [text, why] : std::vector<std::pair<std::string, std::string>>{
           {"", "is not a list of counts"},
           {"3,4,,5", "is not a list of counts"},
           {"3,4,5,", "is not a list of counts"},
           {"3,-4,13", "is not a list of counts"},
           {"3;4;5", "is not a list of counts"},
           {"3,4,99999999999999999999", "is not a list of counts"},
           {"3,9", "has 2 parts"},
           {"3,4,4", "has 11 layers, the model has 12"},
           {"3,9223372036854775807,9223372036854775807", "has more than 12 layers"}}) {
    try {
      parse_layer_split(text, 12, 3);
      ADD_FAILURE() << "not refused: " << text;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), testing::AllOf(HasSubstr("layer split '" + text), HasSubstr("' " + why)));
      EXPECT_THAT(error.what(), HasSubstr("Mend: 3 counts (stages x chunks) that add up to 12, e.g. 4,4,4"));
    }
  }
}

}  // namespace
}  // namespace lockstep
