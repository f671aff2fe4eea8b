#include "../../launcher/src/restart_policy.h"

#include <csignal>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep::launcher {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

Ending killed(int64_t durable_step = -1) {
  return {.exit_code = 75, .cause = Cause::kKilled, .was_ready = true, .durable_step = durable_step};
}
Ending crashed(int64_t step, int64_t durable_step = -1) {
  return {.exit_code = 70,
          .cause = Cause::kCrashed,
          .was_ready = true,
          .signature = "signal 6",
          .step = step,
          .durable_step = durable_step};
}
Ending thrown(int exit_code, int64_t durable_step = -1) {
  return {.exit_code = exit_code, .was_ready = true, .durable_step = durable_step};
}

TEST(RestartPolicy, SomeEndsAreFinalAndKeepTheirCode) {
  for (const int code : {0, 1, 37, 65, 70, 73, 78, 79}) {
    const Decision decision = RestartPolicy(3, 1).after(thrown(code));
    EXPECT_FALSE(decision.goes_on) << code;
    EXPECT_EQ(decision.exit_code, code);
  }
}

TEST(RestartPolicy, OthersMayPass) {
  for (const int code : {74, 75, 76}) EXPECT_TRUE(RestartPolicy(3, 1).after(thrown(code)).goes_on) << code;
  EXPECT_TRUE(RestartPolicy(3, 1).after(crashed(7)).goes_on);
  Ending bad_host = thrown(79);
  bad_host.can_do_without_host = true;
  EXPECT_TRUE(RestartPolicy(3, 1).after(bad_host).goes_on);
}

TEST(RestartPolicy, WhoWasAskedToStopIsNotStartedAgain) {
  Ending ending = killed();
  ending.was_asked = true;
  const Decision decision = RestartPolicy(3, 1).after(ending);
  EXPECT_FALSE(decision.goes_on);
  EXPECT_EQ(decision.exit_code, 75);
}

TEST(RestartPolicy, WithoutRestartsEveryCodeIsPassedOn) {
  for (const int code : {74, 75, 76}) EXPECT_EQ(RestartPolicy(0, 1).after(thrown(code)).exit_code, code);
}

TEST(RestartPolicy, TheFirstTimeAfterAKillItGoesOnAtOnceThenItWaits) {
  RestartPolicy policy(100, 1);
  EXPECT_EQ(policy.after(killed()).delay, milliseconds(0));
  EXPECT_GE(policy.after(killed()).delay, milliseconds(800));
  EXPECT_GE(RestartPolicy(100, 1).after(thrown(74)).delay, milliseconds(800));
}

TEST(RestartPolicy, WaitsDoubleUpToAMinuteWithJitter) {
  std::set<int64_t> first;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    RestartPolicy policy(100, seed);
    Ending ending = thrown(74);
    ending.was_ready = false;  // it never trained, so cycles do not end it
    for (const int64_t whole : {1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000}) {
      const int64_t delay = policy.after(ending).delay.count();
      EXPECT_GE(delay, whole * 8 / 10);
      EXPECT_LE(delay, whole * 12 / 10);
      if (whole == 1000) first.insert(delay);
    }
  }
  EXPECT_GT(first.size(), 10) << "many jobs would come back together";
}

TEST(RestartPolicy, TheSameSeedDecidesTheSame) {
  RestartPolicy one(9, 5), other(9, 5);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(one.after(thrown(74)).delay, other.after(thrown(74)).delay);
}

TEST(RestartPolicy, TheBudgetIsSpentAndRefilledByDurableSteps) {
  RestartPolicy policy(3, 1);
  Ending ending = killed(10);
  ending.was_ready = false;
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(policy.after(ending).goes_on) << i;
  ending.durable_step = 11;
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(policy.after(ending).goes_on) << i;
  const Decision spent = policy.after(ending);
  EXPECT_FALSE(spent.goes_on);
  EXPECT_EQ(spent.exit_code, 77);
  EXPECT_THAT(spent.why, HasSubstr("all 3 restarts are spent"));
}

TEST(RestartPolicy, ADurableStepThatFallsBackIsNoProgress) {
  RestartPolicy policy(2, 1);
  EXPECT_TRUE(policy.after(killed(10)).goes_on);
  EXPECT_TRUE(policy.after(killed(4)).goes_on);  // the newest one was bad
  EXPECT_FALSE(policy.after(killed(9)).goes_on);
}

TEST(RestartPolicy, TheSameFailureTwiceStopsIt) {
  RestartPolicy policy(100, 1);
  EXPECT_TRUE(policy.after(crashed(7, 6)).goes_on);
  const Decision decision = policy.after(crashed(7, 6));
  EXPECT_FALSE(decision.goes_on);
  EXPECT_EQ(decision.exit_code, 70);
  EXPECT_THAT(decision.why, HasSubstr("twice (signal 6 at step 7)"));
}

TEST(RestartPolicy, TheSameFailureWithAKillBetweenStopsItToo) {
  RestartPolicy policy(100, 1);
  EXPECT_TRUE(policy.after(crashed(7)).goes_on);
  EXPECT_TRUE(policy.after(killed()).goes_on);
  EXPECT_FALSE(policy.after(crashed(7)).goes_on);
}

TEST(RestartPolicy, AnotherStepOrProgressMakesItAnotherFailure) {
  RestartPolicy policy(100, 1);
  EXPECT_TRUE(policy.after(crashed(7)).goes_on);
  EXPECT_TRUE(policy.after(crashed(9)).goes_on);
  EXPECT_TRUE(policy.after(crashed(9, 8)).goes_on) << "step 8 became durable between";
}

TEST(RestartPolicy, ThreeCyclesWithoutProgressStopIt) {
  RestartPolicy policy(100, 1);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(policy.after(killed(5)).goes_on) << i;
  const Decision decision = policy.after(killed(5));
  EXPECT_FALSE(decision.goes_on);
  EXPECT_EQ(decision.exit_code, 77);
  EXPECT_THAT(decision.why, HasSubstr("made no new checkpoint durable"));
}

TEST(RestartPolicy, ANewSupervisorGoesOnWithWhatIsLeft) {
  RestartPolicy first(2, 1);
  EXPECT_TRUE(first.after(killed(5)).goes_on);
  RestartPolicy second(2, 2, first.state());
  EXPECT_TRUE(second.after(killed(5)).goes_on);
  EXPECT_FALSE(second.after(killed(5)).goes_on);
}

}  // namespace
}  // namespace lockstep::launcher
