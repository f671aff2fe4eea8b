#include <cstdio>
#include <string>

#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pty.h>

#include <lockstep/base/unique_handle.h>
#include <lockstep/metrics/run_log.h>

namespace lockstep::metrics {
namespace {

using testing::HasSubstr;
using testing::Not;

// What `body` writes to stderr when that is `write_end`, read from `read_end`.
template <typename Body>
std::string said(UniqueFd read_end, UniqueFd write_end, Body body) {
  std::fflush(stderr);
  const UniqueFd kept(dup(STDERR_FILENO));
  dup2(write_end.get(), STDERR_FILENO);
  body();
  std::fflush(stderr);
  dup2(kept.get(), STDERR_FILENO);
  write_end.reset();  // now reading ends: at the end of a pipe, with an error of a terminal
  std::string text;
  char chunk[256];
  for (ssize_t n = 0; (n = read(read_end.get(), chunk, sizeof(chunk))) > 0;) text.append(chunk, static_cast<size_t>(n));
  return text;
}

template <typename Body>
std::string said_to_a_pipe(Body body) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  return said(UniqueFd(ends[0]), UniqueFd(ends[1]), body);
}

template <typename Body>
std::string said_to_a_terminal(Body body) {
  int master = -1, terminal = -1;
  EXPECT_EQ(openpty(&master, &terminal, nullptr, nullptr, nullptr), 0);
  return said(UniqueFd(master), UniqueFd(terminal), body);
}

TEST(ProgressLineTest, AFileGetsALineEveryIntervalAndTheLast) {
  const std::string text = said_to_a_pipe([] {
    ProgressLine line(25, 10);
    for (int64_t step = 1; step <= 25; ++step) line.step(step, 2.10341, 3e-4, 0.84, 41'234, "tokens");
  });
  EXPECT_THAT(text, testing::MatchesRegex("step 10/25 .*\nstep 20/25 .*\nstep 25/25 .*\n"));
  EXPECT_THAT(text, HasSubstr("step 20/25  loss 2.1034  lr 3.00e-04  grad norm 0.840  41.2k tokens/s  eta 0:00"));
  EXPECT_THAT(text, Not(HasSubstr("\033")));
  EXPECT_THAT(text, Not(HasSubstr("\r")));
}

TEST(ProgressLineTest, WithoutAnIntervalOnlyTheLastStepIsSaid) {
  const std::string text = said_to_a_pipe([] {
    ProgressLine line(3, 0);
    for (int64_t step = 1; step <= 3; ++step) line.step(step, 1, 1, 1, 12, "samples");
  });
  EXPECT_THAT(text, testing::MatchesRegex("step 3/3 .*12 samples/s.*\n"));
}

TEST(ProgressLineTest, ATerminalHasOneLineThatMessagesDoNotTear) {
  const std::string text = said_to_a_terminal([] {
    ProgressLine line(1000, 10);
    line.step(1, 2, 1e-3, 1, 3.5e6, "tokens");
    for (int64_t step = 2; step < 900; ++step) line.step(step, 2, 1e-3, 1, 3.5e6, "tokens");  // too soon to redraw
    line.message("checkpoint durable");
    line.step(1000, 1, 1e-3, 1, 3.5e6, "tokens");
    line.finish();
    line.finish();
  });
  EXPECT_THAT(text, testing::StartsWith("\r\033[Kstep 1/1000"));
  EXPECT_THAT(text, HasSubstr("3.50M tokens/s"));
  EXPECT_THAT(text, HasSubstr("\r\033[Kcheckpoint durable\r\n"));
  EXPECT_THAT(text, testing::EndsWith("eta 0:00\r\n"));
  EXPECT_LT(text.size(), 1000u) << "hundreds of redraws";
}

}  // namespace
}  // namespace lockstep::metrics
