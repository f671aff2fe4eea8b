#include <csignal>
#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/launch_records.h>

#include "temp_dir.h"

namespace lockstep {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

TEST(LaunchRecords, WhatRanksSayIsFound) {
  const TempDir folder;
  const LaunchRecords records(folder.path());
  EXPECT_FALSE(records.is_ready());
  EXPECT_EQ(records.done(), std::nullopt);
  EXPECT_THAT(records.failures(), IsEmpty());
  records.say_ready();
  records.say_done(75);
  records.say_failed(11, 74, "no room \"here\"\n\xff and there");
  note_step(120);
  records.say_failed(2, 70, "a bug");
  EXPECT_TRUE(records.is_ready());
  EXPECT_EQ(records.done(), 75);
  const auto failures = records.failures();
  ASSERT_EQ(failures.size(), 2);
  EXPECT_EQ(failures[0].rank, 2);
  EXPECT_EQ(failures[0].step, 120);
  EXPECT_EQ(failures[1].rank, 11);
  EXPECT_EQ(failures[1].exit_code, 74);
  EXPECT_EQ(failures[1].step, std::nullopt);
  EXPECT_THAT(failures[1].message, HasSubstr("no room \"here\"\n"));
  EXPECT_NE(failures[1].host, "");
}

TEST(LaunchRecords, TheFirstWordOfARankStays) {
  const TempDir folder;
  const LaunchRecords records(folder.path());
  records.say_failed(0, 74, "first");
  records.say_failed(0, 70, "second");
  ASSERT_EQ(records.failures().size(), 1);
  EXPECT_EQ(records.failures()[0].message, "first");
}

TEST(LaunchRecords, WithoutAFolderNothingIsWrittenOrFound) {
  const LaunchRecords records = LaunchRecords::from_environment([](const char*) { return std::nullopt; });
  records.say_ready();
  records.say_failed(0, 70, "a bug");
  EXPECT_FALSE(records.is_ready());
  EXPECT_THAT(records.failures(), IsEmpty());
  EXPECT_FALSE(std::filesystem::exists("ready"));
}

TEST(LaunchRecords, AFolderThatCannotBeWrittenStopsNobody) { LaunchRecords("/no/such/folder").say_ready(); }

TEST(LaunchRecords, RubbishIsPassedOver) {
  const TempDir folder;
  for (const char* name : {"failure.1", "failure.x", "failure.", "failure.-1", "done"})
    std::ofstream(folder / name) << "{\"exit";
  std::ofstream(folder / "failure.3") << R"({"exit_code":"seven","message":5,"step":null})";
  std::ofstream(folder / "failure.4") << "[1]";
  std::filesystem::create_directory(folder / "failure.5");
  const LaunchRecords records(folder.path());
  EXPECT_EQ(records.done(), std::nullopt);
  ASSERT_EQ(records.failures().size(), 1);
  EXPECT_EQ(records.failures()[0].rank, 3);
  EXPECT_EQ(records.failures()[0].exit_code, 0);
}

TEST(LaunchRecords, RemovingTakesOnlyWhatIsOurs) {
  const TempDir folder;
  const LaunchRecords records(folder.path());
  records.say_ready();
  records.say_done(0);
  records.say_failed(3, 70, "a bug");
  std::ofstream(folder / "failure.3.77.crash.tmp") << "{";
  std::ofstream(folder / "hang.json") << "{}";
  records.remove();
  std::vector<std::string> left;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) left.push_back(entry.path().filename());
  EXPECT_EQ(left, std::vector<std::string>{"hang.json"});
}

// NOLINTNEXTLINE(misc-no-recursion): that is what it is for
[[gnu::noinline]] int overflow(volatile char* outer, int64_t depth) {
  volatile char frame[4096];
  frame[0] = outer ? *outer : '\1';
  return depth == 0 ? 0 : overflow(frame, depth - 1) + frame[0];
}

void die(const std::string& deed) {
  if (deed == "overflow") overflow(nullptr, int64_t{1} << 40);
  if (deed == "segv") std::raise(SIGSEGV);
  if (deed == "bus") std::raise(SIGBUS);
  if (deed == "fpe") std::raise(SIGFPE);
  std::abort();
}

struct Crash {
  const char* deed;
  int signal;
  friend void PrintTo(const Crash& crash, std::ostream* out) { *out << crash.deed; }
};
class CrashTest : public testing::TestWithParam<Crash> {};

TEST_P(CrashTest, LeavesARecordAndTheSignal) {
#ifdef LOCKSTEP_SANITIZED
  GTEST_SKIP() << "the sanitizer has handlers of its own, which stay";
#endif
  const TempDir folder;
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(::open((folder / "said").c_str(), O_CREAT | O_WRONLY, 0600), STDERR_FILENO);
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGABRT}) std::signal(signal, SIG_DFL);
    note_step(7);
    LaunchRecords(folder.path()).record_crashes(5, 8);
    die(GetParam().deed);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == GetParam().signal) << status;
  const auto failures = LaunchRecords(folder.path()).failures();
  ASSERT_EQ(failures.size(), 1);
  EXPECT_EQ(failures[0].rank, 5);
  EXPECT_EQ(failures[0].exit_code, 70);
  EXPECT_EQ(failures[0].signal, GetParam().signal);
  EXPECT_EQ(failures[0].step, 7);
  EXPECT_NE(failures[0].host, "");
  std::string said((std::istreambuf_iterator<char>(std::ifstream(folder / "said").rdbuf())), {});
  EXPECT_THAT(said, HasSubstr("[rank 5/8] died by signal " + std::to_string(GetParam().signal)));
}

INSTANTIATE_TEST_SUITE_P(Ways, CrashTest,
                         testing::Values(Crash{"segv", SIGSEGV}, Crash{"overflow", SIGSEGV}, Crash{"bus", SIGBUS},
                                         Crash{"fpe", SIGFPE}, Crash{"abort", SIGABRT}),
                         [](const auto& instance) { return instance.param.deed; });

}  // namespace
}  // namespace lockstep
