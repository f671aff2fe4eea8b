// Every schedule for up to 8 stages and 33 micro-batches is validated; validate() itself must see what is planted.
#include <functional>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/pipeline_schedule.h>

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Kind = ActionKind;

constexpr int kMaxStages = 8, kMaxChunks = 3;
#ifdef LOCKSTEP_SANITIZED  // seconds become minutes there
constexpr int64_t kMaxMicroBatches = 17;
#else
constexpr int64_t kMaxMicroBatches = 33;
#endif

void for_all_sizes(int max_chunks, const std::function<void(int stages, int chunks, int64_t micro_batches)>& body) {
  for (int stages = 1; stages <= kMaxStages; ++stages) {
    for (int chunks = 1; chunks <= max_chunks; ++chunks) {
      for (int64_t micro_batches = 0; micro_batches <= kMaxMicroBatches; ++micro_batches)
        body(stages, chunks, micro_batches);
    }
  }
}

int64_t most_in_flight(const PipelineSchedule& schedule, int stage) {
  int64_t now = 0, most = 0;
  for (const PipelineAction& action : schedule.stages[stage]) {
    now += action.kind == Kind::kForward ? 1 : action.kind == Kind::kBackward ? -1 : 0;
    most = std::max(most, now);
  }
  return most;
}

TEST(PipelineScheduleTest, GpipeIsValidAndHasItsBubble) {
  for_all_sizes(1, [](int p, int, int64_t m) {
    const PipelineSchedule schedule = gpipe_schedule(p, m);
    EXPECT_NO_THROW(validate(schedule));
    for (int stage = 0; stage < p; ++stage) EXPECT_EQ(most_in_flight(schedule, stage), m);
    EXPECT_DOUBLE_EQ(chart(schedule).bubble_fraction(), m == 0 ? 0 : double(p - 1) / double(m)) << p << " " << m;
  });
}

TEST(PipelineScheduleTest, OneForwardOneBackwardIsValidHasTheSameBubbleAndHoldsFewMicroBatches) {
  for_all_sizes(1, [](int p, int, int64_t m) {
    const PipelineSchedule schedule = schedule_1f1b(p, m);
    EXPECT_NO_THROW(validate(schedule));
    for (int stage = 0; stage < p; ++stage)
      EXPECT_EQ(most_in_flight(schedule, stage), std::min<int64_t>(m, p - stage)) << p << " " << m;
    EXPECT_DOUBLE_EQ(chart(schedule).bubble_fraction(), m == 0 ? 0 : double(p - 1) / double(m)) << p << " " << m;
  });
}

TEST(PipelineScheduleTest, InterleavedIsValidForAnyNumberOfMicroBatches) {
  for_all_sizes(kMaxChunks, [](int p, int v, int64_t m) {
    const PipelineSchedule schedule = interleaved_schedule(p, v, m);
    EXPECT_NO_THROW(validate(schedule)) << p << " " << v << " " << m;
    for (int stage = 0; stage < p && v > 1; ++stage) {
      const int64_t bound = std::min(m * v, int64_t{(v - 1) * p + 2 * (p - 1 - stage) + 1});
      EXPECT_EQ(schedule.max_in_flight[stage], bound);
      if (m % p == 0) {
        EXPECT_EQ(most_in_flight(schedule, stage), bound) << p << " " << v << " " << m;
      }
    }
    const double bubble = chart(schedule).bubble_fraction(), of_multiple = m == 0 ? 0 : double(p - 1) / double(v * m);
    if (m % p == 0) {
      EXPECT_DOUBLE_EQ(bubble, of_multiple) << p << " " << v << " " << m;
    }
  });
}

TEST(PipelineScheduleTest, ForwardOnlyIsValidAndFillsThePipelineOnce) {
  for_all_sizes(kMaxChunks, [](int p, int v, int64_t m) {
    const PipelineSchedule schedule = forward_only_schedule(p, v, m);
    EXPECT_NO_THROW(validate(schedule)) << p << " " << v << " " << m;
    if (m > 0 && m % p == 0) {
      EXPECT_EQ(chart(schedule).num_ticks, m * v + p - 1) << p << " " << v << " " << m;
    }
  });
}

TEST(PipelineScheduleTest, AShortLastGroupCostsLessThanFillingItUp) {
  for_all_sizes(kMaxChunks, [](int p, int v, int64_t m) {
    const int64_t filled = (m + p - 1) / p * p;
    EXPECT_LE(chart(interleaved_schedule(p, v, m)).num_ticks, chart(interleaved_schedule(p, v, filled)).num_ticks);
  });
}

TEST(PipelineScheduleTest, SlotsLeftOutAreSpreadSoThatTheyCostLittle) {
  // Ticks, all left out at the end: 57, 73, 123.
  EXPECT_EQ(chart(interleaved_schedule(4, 2, 7)).num_ticks, 52);
  EXPECT_EQ(chart(interleaved_schedule(4, 2, 10)).num_ticks, 70);
  EXPECT_EQ(chart(interleaved_schedule(4, 2, 17)).num_ticks, 113);
}

TEST(PipelineScheduleTest, IsFoundByItsName) {
  EXPECT_EQ(make_schedule("1f1b", 4, 1, 8).stages, schedule_1f1b(4, 8).stages);
  EXPECT_EQ(make_schedule("gpipe", 4, 1, 8).stages, gpipe_schedule(4, 8).stages);
  EXPECT_EQ(make_schedule("interleaved", 4, 2, 8).stages, interleaved_schedule(4, 2, 8).stages);
  try {
    make_schedule("interleave", 4, 2, 8);
    ADD_FAILURE() << "not refused";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("did you mean interleaved?"));
  }
  EXPECT_THROW(make_schedule("1f1b", 4, 2, 8), ConfigError);
}

TEST(PipelineScheduleTest, IsDrawnForPeople) {
  EXPECT_EQ(draw(schedule_1f1b(2, 3)),
            "1f1b, 2 stages, 3 micro-batches: 2 1 in flight, bubble 33.3 % of the ideal time\n"
            "stage 0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --\n"
            "stage 1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  .\n");
  EXPECT_EQ(draw(interleaved_schedule(2, 2, 2)),
            "interleaved, 2 stages, 2 chunks each, 2 micro-batches: 4 3 in flight, bubble 25.0 % of the ideal time\n"
            "stage 0 | F0a F1a F0b F1b .   .   B0b --  .   B1b --  B0a --  B1a --\n"
            "stage 1 | .   F0a F1a F0b B0b --  F1b B1b --  B0a --  B1a --  .   .\n");
  EXPECT_EQ(draw(forward_only_schedule(2, 1, 2)),
            "forward only, 2 stages, 2 micro-batches: bubble 50.0 % of the ideal time\n"
            "stage 0 | F0 F1 .\n"
            "stage 1 | .  F0 F1\n");
}

// validate() must refuse `schedule` in words that hold all of `parts`.
void expect_refused(const PipelineSchedule& schedule, const std::vector<std::string>& parts) {
  try {
    validate(schedule);
    ADD_FAILURE() << "not refused: " << parts[0];
  } catch (const CheckFailed& error) {
    for (const std::string& part : parts) EXPECT_THAT(error.what(), HasSubstr(part));
  }
}

std::vector<PipelineAction>::iterator find(PipelineSchedule& schedule, int stage, const PipelineAction& action) {
  auto& list = schedule.stages[stage];
  const auto found = std::find(list.begin(), list.end(), action);
  EXPECT_NE(found, list.end()) << action.describe();
  return found;
}

TEST(ValidateScheduleTest, SeesTwoSendsSwapped) {
  PipelineSchedule schedule = gpipe_schedule(3, 4);
  // Both after both forwards, so that only their order is wrong.
  auto& list = schedule.stages[1];
  std::erase(list, PipelineAction{Kind::kSendForward, 1, 0});
  list.insert(find(schedule, 1, {Kind::kSendForward, 2, 0}) + 1, PipelineAction{Kind::kSendForward, 1, 0});
  expect_refused(schedule,
                 {"from stage 1", "recv_forward of micro-batch 1", "send_forward of micro-batch 2", "stage 2"});
}

TEST(ValidateScheduleTest, SeesTwoReceivesSwapped) {
  PipelineSchedule schedule = interleaved_schedule(2, 2, 4);
  std::iter_swap(find(schedule, 1, {Kind::kRecvForward, 0, 0}), find(schedule, 1, {Kind::kRecvForward, 1, 0}));
  expect_refused(schedule, {"stage 1, action", "without a recv_forward of micro-batch 0, chunk 0 before it"});
}

TEST(ValidateScheduleTest, SeesADroppedReceive) {
  PipelineSchedule schedule = schedule_1f1b(4, 6);
  schedule.stages[2].erase(find(schedule, 2, {Kind::kRecvBackward, 3, 0}));
  expect_refused(schedule, {"stage 2", "recv_backward of micro-batch 3, chunk 0"});
}

TEST(ValidateScheduleTest, SeesADroppedSend) {
  PipelineSchedule schedule = schedule_1f1b(4, 6);
  schedule.stages[2].erase(find(schedule, 2, {Kind::kSendForward, 5, 0}));
  expect_refused(schedule, {"stage 2 misses send_forward of micro-batch 5, chunk 0"});
}

TEST(ValidateScheduleTest, SeesACircleEvenWithBufferedSends) {
  // Stage 0 wants the first gradient before its second forward; stage 1 wants the second input before its first
  // backward.
  PipelineSchedule schedule = schedule_1f1b(2, 2);
  schedule.max_in_flight = {2, 2};
  schedule.stages[0] = {{Kind::kForward, 0, 0},      {Kind::kSendForward, 0, 0}, {Kind::kRecvBackward, 0, 0},
                        {Kind::kBackward, 0, 0},     {Kind::kForward, 1, 0},     {Kind::kSendForward, 1, 0},
                        {Kind::kRecvBackward, 1, 0}, {Kind::kBackward, 1, 0}};
  schedule.stages[1] = {{Kind::kRecvForward, 0, 0}, {Kind::kForward, 0, 0},     {Kind::kRecvForward, 1, 0},
                        {Kind::kForward, 1, 0},     {Kind::kBackward, 0, 0},    {Kind::kSendBackward, 0, 0},
                        {Kind::kBackward, 1, 0},    {Kind::kSendBackward, 1, 0}};
  expect_refused(schedule, {"circle", "buffered", "stage 0, action 3: backward of micro-batch 0",
                            "stage 1, action 3: forward of micro-batch 1"});
  EXPECT_THROW(chart(schedule), CheckFailed);
}

TEST(ValidateScheduleTest, SeesACircleOfGroupedTransfersAlone) {
  // Stage 1 announces the second input beside the first one. Were both to end together, it would wait for a send that
  // comes after the backward it holds up; announced only, they hold up nobody.
  PipelineSchedule schedule = schedule_1f1b(2, 2);
  schedule.stages[0] = {{Kind::kForward, 0, 0},      {Kind::kSendForward, 0, 0}, {Kind::kRecvBackward, 0, 0},
                        {Kind::kBackward, 0, 0},     {Kind::kForward, 1, 0},     {Kind::kSendForward, 1, 0},
                        {Kind::kRecvBackward, 1, 0}, {Kind::kBackward, 1, 0}};
  schedule.stages[1] = {{Kind::kRecvForward, 0, 0},  {Kind::kForward, 0, 0},     {Kind::kBackward, 0, 0},
                        {Kind::kSendBackward, 0, 0}, {Kind::kRecvForward, 1, 0}, {Kind::kForward, 1, 0},
                        {Kind::kBackward, 1, 0},     {Kind::kSendBackward, 1, 0}};
  EXPECT_NO_THROW(validate(schedule));
  std::erase(schedule.stages[1], PipelineAction{Kind::kRecvForward, 1, 0});
  schedule.stages[1].insert(schedule.stages[1].begin() + 1, PipelineAction{Kind::kRecvForward, 1, 0});
  expect_refused(schedule, {"circle", "groups", "stage 1, action 0: recv_forward of micro-batch 0",
                            "waits for stage 0, action 5: send_forward of micro-batch 1"});
  EXPECT_NO_THROW(chart(schedule));
}

TEST(ValidateScheduleTest, SeesWhatIsOutOfOrderInOneList) {
  PipelineSchedule schedule = schedule_1f1b(1, 2);
  std::swap(schedule.stages[0][0], schedule.stages[0][1]);
  expect_refused(schedule, {"stage 0, action 0: backward of micro-batch 0, chunk 0", "without a forward"});

  schedule = schedule_1f1b(2, 2);
  schedule.stages[1].push_back({Kind::kSendForward, 0, 0});
  expect_refused(schedule, {"send_forward of micro-batch 0, chunk 0 has no business there"});

  schedule = schedule_1f1b(2, 2);
  schedule.stages[0].push_back({Kind::kForward, 1, 0});
  expect_refused(schedule, {"forward of micro-batch 1, chunk 0 comes a second time"});

  schedule = schedule_1f1b(2, 2);
  schedule.stages[0].push_back({Kind::kForward, 2, 0});
  expect_refused(schedule, {"outside 2 micro-batches"});
}

TEST(ValidateScheduleTest, SeesTooManyInFlight) {
  PipelineSchedule schedule = gpipe_schedule(3, 5);
  schedule.max_in_flight = schedule_1f1b(3, 5).max_in_flight;
  expect_refused(schedule, {"stage 0", "forward of micro-batch 3", "4 in flight, at most 3"});
}

}  // namespace
}  // namespace lockstep
