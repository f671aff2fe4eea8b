// Each case in a process of its own, because logging starts once a process.
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>

#include <sys/stat.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/fs.h>
#include <lockstep/base/log.h>

#include "temp_dir.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::ContainsRegex;
using testing::HasSubstr;
using testing::Not;

class LogDeathTest : public testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(LogDeathTest, ALineOnStderrSaysLevelTimeRankAndPlace) {
  EXPECT_EXIT(
      {
        start_logging("trainer", 3, 8);
        start_logging("trainer", 3, 8);  // a second time is borne
        LOG(WARNING) << "slow disk";
        _exit(0);
      },
      testing::ExitedWithCode(0),
      ContainsRegex("W [0-9]+:[0-9]+:[0-9]+\\.[0-9]+ \\[rank 3/8\\] log_test\\.cc:[0-9]+\\] slow disk"));
}

TEST_F(LogDeathTest, ARankHasOneFileThatOnlyItsOwnerReads) {
  // The child runs this binary anew up to here: it takes its parent's folder.
  const char* inherited = getenv("LOG_TEST_DIR");
  const auto dir = inherited == nullptr ? std::make_unique<TempDir>() : nullptr;
  const std::string folder = inherited == nullptr ? dir->path() : inherited;
  ASSERT_EQ(setenv("LOG_TEST_DIR", folder.c_str(), 1), 0);
  EXPECT_EXIT(
      {
        share_new_files(Share::kNone);
        start_logging("/opt/bin/trainer", 3, 8, folder);
        LOG(INFO) << "step 1";
        LOG(ERROR) << "lost a peer";
        _exit(0);  // no flush: a killed rank does not either
      },
      testing::ExitedWithCode(0), AllOf(HasSubstr("step 1"), HasSubstr("lost a peer")));
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    ++files;
    EXPECT_THAT(entry.path().filename().string(), testing::StartsWith("trainer.rank3."));
    struct stat status {};
    ASSERT_EQ(::lstat(entry.path().c_str(), &status), 0);
    EXPECT_EQ(status.st_mode, S_IFREG | 0600u);
    std::stringstream text;
    text << std::ifstream(entry.path()).rdbuf();
    EXPECT_THAT(text.str(), AllOf(HasSubstr("[rank 3/8]"), HasSubstr("step 1"), HasSubstr("lost a peer")));
  }
  EXPECT_EQ(files, 1);
  unsetenv("LOG_TEST_DIR");
}

}  // namespace
}  // namespace lockstep
