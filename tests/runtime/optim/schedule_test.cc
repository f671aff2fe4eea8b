#include <cmath>
#include <numbers>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/optim/schedule.h>

namespace lockstep::optim {
namespace {

using testing::HasSubstr;

constexpr double kPeak = 3e-3;
constexpr double kEps = 1e-15 * kPeak;  // a handful of roundings in double

const std::vector<std::string> kKinds = {"constant", "cosine", "linear", "wsd"};

ScheduleOptions options(const std::string& kind, int64_t warmup_steps, int64_t total_steps) {
  return {.kind = kind,
          .learning_rate = kPeak,
          .final_fraction = 0.1,
          .warmup_steps = warmup_steps,
          .total_steps = total_steps,
          .decay_fraction = 0.25};
}

std::string refusal(const ScheduleOptions& options, int64_t step) {
  try {
    learning_rate_at(options, step);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "taken";
}

TEST(ScheduleTest, EveryKindWarmsUpInEqualStepsFromTheFirstToThePeak) {
  for (const auto& kind : kKinds) {
    for (const int64_t warmup : {1, 3, 7}) {
      const auto schedule = options(kind, warmup, 101);
      for (int64_t step = 0; step < warmup; ++step) {
        EXPECT_NEAR(learning_rate_at(schedule, step),
                    kPeak * static_cast<double>(step + 1) / static_cast<double>(warmup), kEps)
            << kind << " " << step << "/" << warmup;
      }
      EXPECT_NEAR(learning_rate_at(schedule, warmup - 1), kPeak, kEps) << kind;
      EXPECT_NEAR(learning_rate_at(schedule, warmup), kPeak, kEps) << kind << ": decay starts from the peak";
    }
    EXPECT_NEAR(learning_rate_at(options(kind, 0, 101), 0), kPeak, kEps) << kind << " without warm-up";
  }
}

TEST(ScheduleTest, EveryKindButConstantEndsAtTheFinalFractionAndStaysThere) {
  for (const auto& kind : kKinds) {
    const double last = kind == "constant" ? kPeak : 0.1 * kPeak;
    for (const int64_t step : {100, 101, 102, 1000, 1 << 30})
      EXPECT_NEAR(learning_rate_at(options(kind, 7, 101), step), last, kEps) << kind << " " << step;
    if (kind != "wsd") {  // a quarter of one step is none
      EXPECT_NEAR(learning_rate_at(options(kind, 0, 1), 0), last, kEps) << kind << " of one step";
    }
    for (const int64_t step : {6, 7, 100})
      EXPECT_NEAR(learning_rate_at(options(kind, 7, 7), step), kPeak, kEps) << kind << " that only warms up";
  }
}

TEST(ScheduleTest, CosineIsHalfAWave) {
  const auto schedule = options("cosine", 10, 111);  // 100 steps between the first after the warm-up and the last
  for (int64_t step = 10; step <= 110; ++step) {
    const double wave = std::cos(std::numbers::pi * static_cast<double>(step - 10) / 100.0);
    EXPECT_NEAR(learning_rate_at(schedule, step), 0.1 * kPeak + 0.9 * kPeak * (1 + wave) / 2, 4 * kEps) << step;
  }
  EXPECT_NEAR(learning_rate_at(schedule, 60), 0.55 * kPeak, kEps) << "half way";
}

TEST(ScheduleTest, LinearIsALine) {
  const auto schedule = options("linear", 10, 111);
  for (int64_t step = 10; step <= 110; ++step) {
    EXPECT_NEAR(learning_rate_at(schedule, step), kPeak * (1 - 0.9 * static_cast<double>(step - 10) / 100), 4 * kEps)
        << step;
  }
}

TEST(ScheduleTest, WsdStaysAtThePeakAndFallsOverTheLastShare) {
  const auto schedule = options("wsd", 5, 103);  // a quarter of 103 steps, rounded: 26
  for (int64_t step = 5; step < 77; ++step) EXPECT_EQ(learning_rate_at(schedule, step), kPeak) << step;
  for (int64_t step = 77; step < 103; ++step) {
    EXPECT_NEAR(learning_rate_at(schedule, step), kPeak * (1 - 0.9 * static_cast<double>(step - 77) / 25), 4 * kEps)
        << step;
  }
  auto no_decay = schedule;
  no_decay.decay_fraction = 0;
  for (const int64_t step : {5, 102, 103, 500}) EXPECT_EQ(learning_rate_at(no_decay, step), kPeak) << step;
  auto all_decay = schedule;
  all_decay.decay_fraction = 1;
  EXPECT_NEAR(learning_rate_at(all_decay, 51), 0.55 * kPeak, kEps) << "half way of 0..102";
}

TEST(ScheduleTest, ConstantStays) {
  for (const int64_t step : {3, 50, 100}) EXPECT_EQ(learning_rate_at(options("constant", 3, 101), step), kPeak);
}

TEST(ScheduleTest, TheRateNeverRisesAfterTheWarmUpNorFallsInIt) {
  for (const auto& kind : kKinds) {
    const auto schedule = options(kind, 17, 1003);
    for (int64_t step = 1; step < 1100; ++step) {
      const double before = learning_rate_at(schedule, step - 1), now = learning_rate_at(schedule, step);
      EXPECT_TRUE(step < 17 ? now > before : now <= before + kEps) << kind << " " << step;
      EXPECT_GE(now, std::min(0.1, 1.0 / 17) * kPeak - kEps) << kind << " " << step;
    }
  }
}

TEST(ScheduleTest, MistakesAreRefusedAtEveryStepNotOnlyWhenTheyMatter) {
  for (const int64_t step : {0, 3, 50, 1000}) {
    EXPECT_THAT(refusal(options("cosin", 10, 100), step), HasSubstr("--learning_rate_schedule=cosin"));
    EXPECT_THAT(refusal(options("", 0, 100), step), HasSubstr("--learning_rate_schedule="));
    EXPECT_THAT(refusal(options("cosine", 101, 100), step), HasSubstr("--warmup_steps=101"));
    EXPECT_THAT(refusal(options("cosine", -1, 100), step), HasSubstr("--warmup_steps=-1"));
    EXPECT_EQ(refusal(options("cosine", 100, 100), step), "taken");
  }
}

}  // namespace
}  // namespace lockstep::optim
