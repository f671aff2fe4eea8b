#include "../../launcher/src/launch_folder.h"

#include <csignal>
#include <filesystem>
#include <fstream>

#include <sys/wait.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../../launcher/src/secure_channel.h"
#include "../runtime/base/temp_dir.h"

namespace lockstep::launcher {
namespace {

namespace files = std::filesystem;
using testing::HasSubstr;
using testing::IsEmpty;

class LaunchFolderTest : public testing::Test {
 protected:
  void SetUp() override { ::setenv("TMPDIR", temporary_.path().c_str(), 1); }
  void TearDown() override { ::unsetenv("TMPDIR"); }
  TempDir temporary_, run_;
};

files::perms mode_of(const std::string& path) { return files::status(path).permissions(); }

TEST_F(LaunchFolderTest, IsOursAloneAndLeavesNothing) {
  const std::string run_dir = run_ / "run";
  std::string session, shared_memory;
  {
    const LaunchFolder folder(run_dir);
    session = folder.session(), shared_memory = folder.shared_memory();
    EXPECT_THAT(folder.records().folder(), HasSubstr(run_dir + "/launch/lockstep-"));
    for (const std::string& path : {folder.records().folder(), session, shared_memory})
      EXPECT_EQ(mode_of(path), files::perms::owner_all) << path;
    folder.records().say_ready();
    write_rendezvous(folder.records().folder(), {"127.0.0.1", 99, Token::random()});
    std::ofstream(session + "/socket") << "x";
    std::ofstream(shared_memory + "/segment") << "x";
  }
  for (const std::string& path : {session, shared_memory, run_dir}) EXPECT_FALSE(files::exists(path)) << path;
}

TEST_F(LaunchFolderTest, LeavesWhatTheRunAndOthersMade) {
  std::string records;
  {
    const LaunchFolder folder(run_.path());
    records = folder.records().folder();
    folder.records().say_done(0);
    std::ofstream(records + "/hang.json") << "{}";
    std::ofstream(run_ / "run.json") << "{}";
  }
  EXPECT_TRUE(files::exists(records + "/hang.json"));
  EXPECT_FALSE(files::exists(records + "/done"));
  EXPECT_TRUE(files::exists(run_ / "run.json"));
}

TEST_F(LaunchFolderTest, WithoutARunDirectoryItIsTemporary) {
  for (const char* run_dir : {"", "/proc/nowhere"}) {
    const LaunchFolder folder(run_dir);
    folder.records().say_ready();
    EXPECT_TRUE(folder.records().is_ready());
    EXPECT_THAT(folder.records().folder(), HasSubstr(temporary_.path()));
  }
  EXPECT_TRUE(files::is_empty(temporary_.path()));
}

// A launcher that is killed with a start under way: what it leaves is swept, and what it started is ended.
TEST_F(LaunchFolderTest, WhatADeadLauncherLeftIsSweptWithItsProcesses) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t launcher = ::fork();
  if (launcher == 0) {
    auto* folder = new LaunchFolder(run_.path());
    folder->records().say_ready();
    const std::string variable = "LOCKSTEP_LAUNCH_DIR=" + folder->records().folder();
    const pid_t rank = ::fork();
    if (rank == 0) {
      ::setsid();  // it hides as well as it can
      char* const argv[] = {const_cast<char*>("sleep"), const_cast<char*>("600"), nullptr};
      char* const environment[] = {const_cast<char*>(variable.c_str()), nullptr};
      ::close(ends[0]);
      ::execve("/bin/sleep", argv, environment);
      ::_exit(1);
    }
    if (::write(ends[1], &rank, sizeof(rank)) != sizeof(rank)) ::_exit(1);
    ::pause();
  }
  pid_t rank = 0;
  ASSERT_EQ(::read(ends[0], &rank, sizeof(rank)), static_cast<ssize_t>(sizeof(rank)));
  EXPECT_THAT(sweep_dead_launches(run_.path()), IsEmpty()) << "it lives";
  EXPECT_EQ(::kill(rank, 0), 0);
  while (!files::exists("/proc/" + std::to_string(rank) + "/environ") ||
         std::ifstream("/proc/" + std::to_string(rank) + "/cmdline").peek() != 's')
    usleep(1000);
  ::kill(launcher, SIGKILL);
  ASSERT_EQ(::waitpid(launcher, nullptr, 0), launcher);
  EXPECT_EQ(sweep_dead_launches(run_.path()).size(), 3);  // records, session, shared memory
  std::ifstream state("/proc/" + std::to_string(rank) + "/stat");
  std::string stat;
  EXPECT_TRUE(!std::getline(state, stat) || stat[stat.rfind(')') + 2] == 'Z') << stat;
  EXPECT_TRUE(files::is_empty(run_ / "launch"));
  EXPECT_TRUE(files::is_empty(temporary_.path()));
  for (const auto& entry : files::directory_iterator("/dev/shm"))
    EXPECT_EQ(entry.path().string().find("." + std::to_string(launcher) + "."), std::string::npos) << entry;
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_F(LaunchFolderTest, OthersFoldersStay) {
  const std::string pid = "." + std::to_string(::getpid()) + ".";
  std::string no_pid = launcher_name();
  no_pid.replace(no_pid.find(pid), pid.size(), ".-7.");
  const std::string names[] = {"lockstep-elsewhere.1.2.3.abcdef", "lockstep-x", "lockstep-.....", "unrelated", no_pid};
  for (const std::string& name : names) files::create_directory(temporary_ / name);
  sweep_dead_launches("");
  EXPECT_EQ(std::distance(files::directory_iterator(temporary_.path()), {}), std::ssize(names));
}

}  // namespace
}  // namespace lockstep::launcher
