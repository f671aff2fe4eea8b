// The figures of a run: what a page of them says, to the letter, and that no reader sees half of them.
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/metrics/run_meter.h>

#include "exposition_checker.h"
#include "published.h"

namespace lockstep::metrics {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Key;
using testing::Not;

RunFacts facts() {
  return {.count_unit = "tokens",
          .libtorch = "2.11.0",
          .planned_steps = 1500,
          .samples_per_step = 16,
          .world_size = 4,
          .incarnation = 3,
          .first_step = 100,
          .durable_step = 100};
}

StepFigures step(int64_t number, double seconds) {
  return {.step = number,
          .loss = 2.25,
          .grad_norm = 0.5,
          .learning_rate = 1e-5,
          .count = 2048,
          .seconds = seconds,
          .memory_bytes = 123456789012};
}

std::string page_of(const std::string& family, const std::string& text) {
  const size_t begin = text.find("# HELP lockstep_" + family + " ");
  return begin == std::string::npos ? "" : text.substr(begin, text.find("# HELP", begin + 1) - begin);
}

TEST(ExpositionTest, APageSaysAllThatIsKnownToTheLetter) {
  RunMeter meter(facts());
  meter.step(step(101, 0.25));
  meter.step(step(102, 0.5));
  meter.skip_step();
  meter.evaluation(2.5, std::nan(""));
  meter.save({.step = 102, .is_durable = true, .seconds = 1.5, .stall_seconds = 0.125});
  meter.save({.step = 103});
  std::string text = meter.exposition();
  EXPECT_THAT(exposition_problems(text), IsEmpty());
  const std::string when = page_of("last_step_timestamp_seconds", text);
  ASSERT_NE(when, "");
  text.erase(text.find(when), when.size());
  const std::string histogram = page_of("step_seconds", text);
  text.erase(text.find(histogram), histogram.size());
  EXPECT_EQ(text, R"(# HELP lockstep_build_info Versions; the value is always 1.
# TYPE lockstep_build_info gauge
lockstep_build_info{version="0.1.0",libtorch="2.11.0"} 1
# HELP lockstep_world_size Ranks of the job.
# TYPE lockstep_world_size gauge
lockstep_world_size 4
# HELP lockstep_incarnation Which start of the run this is.
# TYPE lockstep_incarnation gauge
lockstep_incarnation 3
# HELP lockstep_planned_steps Optimizer steps that the run is to have when it ends.
# TYPE lockstep_planned_steps gauge
lockstep_planned_steps 1500
# HELP lockstep_step Optimizer steps finished, those of earlier starts included.
# TYPE lockstep_step gauge
lockstep_step 103
# HELP lockstep_steps_total Optimizer steps finished by this start.
# TYPE lockstep_steps_total counter
lockstep_steps_total 2
# HELP lockstep_skipped_steps_total Steps left out because loss or gradient was not finite.
# TYPE lockstep_skipped_steps_total counter
lockstep_skipped_steps_total 1
# HELP lockstep_loss Training loss of the last step, per counted unit.
# TYPE lockstep_loss gauge
lockstep_loss 2.25
# HELP lockstep_grad_norm Norm of the last step's gradient, before clipping.
# TYPE lockstep_grad_norm gauge
lockstep_grad_norm 0.5
# HELP lockstep_learning_rate Learning rate of the last step.
# TYPE lockstep_learning_rate gauge
lockstep_learning_rate 1e-05
# HELP lockstep_trained_samples_total Samples trained on by this start, over all ranks.
# TYPE lockstep_trained_samples_total counter
lockstep_trained_samples_total 32
# HELP lockstep_trained_samples_per_second Speed of the last step.
# TYPE lockstep_trained_samples_per_second gauge
lockstep_trained_samples_per_second 32
# HELP lockstep_trained_tokens_total What the task counts, trained on by this start, over all ranks.
# TYPE lockstep_trained_tokens_total counter
lockstep_trained_tokens_total 4096
# HELP lockstep_trained_tokens_per_second Speed of the last step.
# TYPE lockstep_trained_tokens_per_second gauge
lockstep_trained_tokens_per_second 4096
# HELP lockstep_memory_bytes Resident memory of rank 0.
# TYPE lockstep_memory_bytes gauge
lockstep_memory_bytes 123456789012
# HELP lockstep_evaluations_total Evaluations finished by this start.
# TYPE lockstep_evaluations_total counter
lockstep_evaluations_total 1
# HELP lockstep_validation_loss Loss of the last evaluation, per counted unit.
# TYPE lockstep_validation_loss gauge
lockstep_validation_loss 2.5
# HELP lockstep_checkpoint_durable_step Step of the newest durable checkpoint.
# TYPE lockstep_checkpoint_durable_step gauge
lockstep_checkpoint_durable_step 102
# HELP lockstep_checkpoint_saves_total Checkpoints of this start that are durable.
# TYPE lockstep_checkpoint_saves_total counter
lockstep_checkpoint_saves_total 1
# HELP lockstep_checkpoint_failed_saves_total Checkpoints of this start that could not be saved.
# TYPE lockstep_checkpoint_failed_saves_total counter
lockstep_checkpoint_failed_saves_total 1
# HELP lockstep_checkpoint_stall_seconds_total Time for which saves have held training up.
# TYPE lockstep_checkpoint_stall_seconds_total counter
lockstep_checkpoint_stall_seconds_total 0.125
# HELP lockstep_checkpoint_last_save_seconds Time the last save took until it was durable.
# TYPE lockstep_checkpoint_last_save_seconds gauge
lockstep_checkpoint_last_save_seconds 1.5
# HELP lockstep_checkpoint_last_stall_seconds Time for which the last save held training up.
# TYPE lockstep_checkpoint_last_stall_seconds gauge
lockstep_checkpoint_last_stall_seconds 0.125
)");
}

TEST(ExpositionTest, StepTimesFallIntoBucketsThatHoldTheirUpperBound) {
  RunMeter meter(facts());
  for (const double seconds : {0.0004, 0.001, 0.0011, 1000.0, 1001.0}) meter.step(step(101, seconds));
  const auto samples = exposition_samples(meter.exposition());
  const auto bucket = [&](const std::string& bound) {
    return samples.at("lockstep_step_seconds_bucket{le=\"" + bound + "\"}");
  };
  EXPECT_EQ(bucket("0.001"), 2);
  EXPECT_EQ(bucket("0.0025"), 3);
  EXPECT_EQ(bucket("500"), 3);
  EXPECT_EQ(bucket("1000"), 4);
  EXPECT_EQ(bucket("+Inf"), 5);
  EXPECT_EQ(samples.at("lockstep_step_seconds_count"), 5);
  EXPECT_DOUBLE_EQ(samples.at("lockstep_step_seconds_sum"), 2001.0025);
}

TEST(ExpositionTest, WhatIsNotKnownYetIsLeftOut) {
  RunFacts fresh = facts();
  fresh.durable_step = -1;
  const std::string text = RunMeter(fresh).exposition();
  EXPECT_THAT(exposition_problems(text), IsEmpty());
  const auto samples = exposition_samples(text);
  EXPECT_EQ(samples.at("lockstep_step"), 100);
  EXPECT_EQ(samples.at("lockstep_steps_total"), 0);
  for (const char* name : {"loss", "last_step_timestamp_seconds", "validation_loss", "checkpoint_durable_step",
                           "checkpoint_last_save_seconds", "memory_bytes"})
    EXPECT_THAT(samples, Not(Contains(Key(std::string("lockstep_") + name))));
}

TEST(ExpositionTest, WhatIsNotFiniteIsSpelledAsPrometheusDoes) {
  RunMeter meter(facts());
  StepFigures figures = step(101, 0.1);
  figures.loss = std::nan("");
  figures.grad_norm = INFINITY;
  figures.learning_rate = -std::numeric_limits<double>::infinity();
  meter.step(figures);
  const std::string text = meter.exposition();
  EXPECT_THAT(text, HasSubstr("\nlockstep_loss NaN\n"));
  EXPECT_THAT(text, HasSubstr("\nlockstep_grad_norm +Inf\n"));
  EXPECT_THAT(text, HasSubstr("\nlockstep_learning_rate -Inf\n"));
  EXPECT_THAT(exposition_problems(text), IsEmpty());
}

TEST(ExpositionTest, UnitsAndVersionsOfAnySpellingMakeALawfulPage) {
  RunFacts odd = facts();
  odd.count_unit = "steps \"a\"/é";
  odd.libtorch = "2\\\"\n";
  RunMeter meter(odd);
  meter.step(step(1, 1));
  EXPECT_THAT(exposition_problems(meter.exposition()), IsEmpty());
  EXPECT_THAT(meter.exposition(), HasSubstr(R"(libtorch="2\\\"\n"})"));
  odd.count_unit = "samples";
  RunMeter plain(odd);
  plain.step(step(1, 1));
  EXPECT_THAT(exposition_problems(plain.exposition()), IsEmpty());
  EXPECT_EQ(exposition_samples(plain.exposition()).at("lockstep_trained_samples_total"), 16);
}

TEST(ExpositionTest, TheSlowestRankIsShownOnceItIsKnown) {
  RunMeter meter(facts());
  StepFigures figures = step(101, 0.1);
  meter.step(figures);
  EXPECT_THAT(meter.exposition(), Not(HasSubstr("straggler")));
  figures.straggler_rank = 3;
  figures.straggler_ratio = 1.5;
  meter.step(figures);
  EXPECT_THAT(exposition_problems(meter.exposition()), IsEmpty());
  const auto samples = exposition_samples(meter.exposition());
  EXPECT_EQ(samples.at("lockstep_straggler_rank"), 3);
  EXPECT_EQ(samples.at("lockstep_straggler_ratio"), 1.5);
}

TEST(ExpositionTest, TasksThatCountRightAnswersShowTheirShare) {
  RunMeter meter(facts());
  StepFigures figures = step(101, 0.1);
  figures.accuracy = 0.75;
  meter.step(figures);
  meter.evaluation(1, 0.5);
  const auto samples = exposition_samples(meter.exposition());
  EXPECT_EQ(samples.at("lockstep_accuracy_ratio"), 0.75);
  EXPECT_EQ(samples.at("lockstep_validation_accuracy_ratio"), 0.5);
}

// The checker is an oracle only if it refuses.
TEST(ExpositionCheckerTest, RefusesWhatPrometheusWouldNotRead) {
  const std::string good = "# HELP a_total A.\n# TYPE a_total counter\na_total 1\n";
  EXPECT_THAT(exposition_problems(good), IsEmpty());
  for (const std::string bad :
       {"a_total 1\n",
        "# HELP a_total A.\na_total 1\n",
        "# HELP a_total A.\n# TYPE a_total counter\n",
        "# HELP a_total A.\n# TYPE a_total counter\na_total 1",
        "# HELP a_total A.\n# TYPE a_total counter\na_total nan\n",
        "# HELP a_total A.\n# TYPE a_total counter\na_total NaN\n",
        "# HELP a_total A.\n# TYPE a_total counter\na_total 1 2\n",
        "# HELP a_total A.\n# TYPE a_total gauge\na_total 1\n",
        "# HELP a A.\n# TYPE a counter\na 1\n",
        "# HELP a_total A.\n# TYPE a_total counter\na_total 1\na_total 1\n",
        "# HELP a_total A.\n# TYPE b_total counter\nb_total 1\n",
        "# HELP a_total A.\n# TYPE a_total counter\nb_total 1\n",
        "# HELP a_total A.\n# TYPE a_total counter\na_total{l=\"\\x\"} 1\n",
        "# HELP a_total A.\n# TYPE a_total counter\na_total 1\r\n",
        "# HELP a_total A.\n\n# TYPE a_total counter\na_total 1\n",
        "# HELP a_ms A.\n# TYPE a_ms gauge\na_ms 1\n",
        "# HELP a-b A.\n# TYPE a-b gauge\na-b 1\n",
        "# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 2\nh_sum 1\nh_count 1\n",
        "# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n",
        "# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_sum 1\nh_count 1\n",
        "# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_count 1\n"})
    EXPECT_THAT(exposition_problems(bad), Not(IsEmpty())) << bad;
  EXPECT_THAT(exposition_problems(good + good), Not(IsEmpty()));
  EXPECT_THAT(exposition_problems(good + "# HELP a A.\n# TYPE a gauge\na 1\n"), Not(IsEmpty())) << "one in OpenMetrics";
}

TEST(HealthTest, ARunIsHealthyAsLongAsSomethingGetsFinished) {
  RunFigures figures;
  figures.last.step = 120;
  figures.progress_ns = 1'000'000'000;
  figures.patience_ns = 5'000'000'000;
  EXPECT_TRUE(health_of(figures, 6'000'000'000).is_good);
  EXPECT_EQ(health_of(figures, 1'400'000'000).text, "ok: step 120, alive 0.4 s ago");
  EXPECT_FALSE(health_of(figures, 6'000'000'001).is_good);
  EXPECT_EQ(health_of(figures, 8'000'000'000).text,
            "nothing finished for 7.0 s, and 5.0 s is the limit; the last was step 120");
}

TEST(HealthTest, PatienceGrowsWithTheLongestStepAndWithWhatIsAnnounced) {
  RunFacts impatient = facts();
  impatient.patience = std::chrono::milliseconds(2'000);
  RunMeter meter(impatient);
  EXPECT_EQ(meter.figures().patience_ns, 2'000'000'000);
  meter.step(step(1, 0.5));
  EXPECT_EQ(meter.figures().patience_ns, 5'000'000'000);
  meter.step(step(2, 0.1));
  EXPECT_EQ(meter.figures().patience_ns, 5'000'000'000);
  meter.progress(std::chrono::seconds(60));
  EXPECT_EQ(meter.figures().patience_ns, 60'000'000'000);
  meter.progress();
  EXPECT_EQ(meter.figures().patience_ns, 5'000'000'000);
}

TEST(PublishedTest, ReadersSeeAWholeValueOrTheNext) {
  struct Value {
    std::array<uint64_t, 256> words;
  };
  Published<Value> published;
  std::atomic<bool> is_over{false};
  std::atomic<int64_t> torn{0}, backwards{0};
  std::vector<std::thread> readers;
  readers.reserve(2);
  for (int i = 0; i < 2; ++i) {
    readers.emplace_back([&] {
      for (uint64_t last = 0; !is_over;) {
        const Value value = published.load();
        for (const uint64_t word : value.words) torn += word != value.words[0];
        backwards += value.words[0] < last;
        last = value.words[0];
      }
    });
  }
  for (uint64_t number = 1; number <= 20'000; ++number) {
    Value value;
    value.words.fill(number);
    published.store(value);
  }
  is_over = true;
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(torn, 0);
  EXPECT_EQ(backwards, 0);
  EXPECT_EQ(published.load().words[47], 20'000u);
}

}  // namespace
}  // namespace lockstep::metrics
