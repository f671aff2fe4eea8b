#include <csignal>

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include <lockstep/base/process.h>

namespace lockstep {
namespace {

TEST(Process, StartTimesTellProcessesApartWhateverTheyCallThemselves) {
  EXPECT_NE(start_time_of(getpid()), "");
  EXPECT_EQ(start_time_of(getpid()), start_time_of(getpid()));
  ::prctl(PR_SET_NAME, "a) Z 1 (");
  const auto stat = read_stat(getpid());
  ASSERT_TRUE(stat);
  EXPECT_EQ(stat->state, 'R');
  EXPECT_EQ(std::to_string(stat->start_time), start_time_of(getpid()));
  usleep(20'000);  // two ticks of the clock it is counted in
  const pid_t child = fork();
  if (child == 0) pause();
  EXPECT_GT(read_stat(child).value_or(ProcessStat()).start_time, stat->start_time);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

TEST(Process, WhatIsOverHasNoStartTime) {
  const pid_t child = fork();
  if (child == 0) _exit(0);
  siginfo_t ended{};
  waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOWAIT);
  EXPECT_EQ(read_stat(child).value_or(ProcessStat()).state, 'Z');
  EXPECT_EQ(start_time_of(child), "");
  waitpid(child, nullptr, 0);
  EXPECT_FALSE(read_stat(child));
  EXPECT_EQ(start_time_of(child), "");
}

}  // namespace
}  // namespace lockstep
