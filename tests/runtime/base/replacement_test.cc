// A file that takes another's place, beside a second start that does the same.
#include <cerrno>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/base/replacement.h>

#include "temp_dir.h"

namespace lockstep {
namespace {

using testing::ElementsAre;

class ReplacementTest : public testing::Test {
 protected:
  void SetUp() override { write_durable(real_fs(), path_, "old"); }
  std::string text() { return read_text(real_fs(), path_, 1 << 20); }
  std::vector<std::string> names() { return real_fs().list_directory(dir_.path()); }
  static void write(Replacement& file, uint64_t offset, const std::string& text) {
    file.file().write_at(offset, std::as_bytes(std::span(text.data(), text.size())));
  }

  TempDir dir_;
  std::string path_ = dir_ / "x";
};

TEST_F(ReplacementTest, ShowsOnceItIsPublishedAndStaysTheFileOneWrites) {
  Replacement file(real_fs(), path_, 3, "new");
  EXPECT_EQ(text(), "old");
  EXPECT_THAT(names(), ElementsAre("x", "x.e0003"));
  write(file, 3, "er");
  file.publish();
  EXPECT_EQ(text(), "newer");
  write(file, 5, "!");
  EXPECT_EQ(text(), "newer!");
  EXPECT_THAT(names(), ElementsAre("x"));
}

TEST_F(ReplacementTest, OneThatIsNotPublishedLeavesNothing) {
  { const Replacement file(real_fs(), path_, 3, "new"); }
  EXPECT_EQ(text(), "old");
  EXPECT_THAT(names(), ElementsAre("x"));
}

TEST_F(ReplacementTest, TwoStartsHaveEachTheirOwn) {
  Replacement older(real_fs(), path_, 9999, "older");
  {
    Replacement newer(real_fs(), path_, 10000, "newer");
    older.publish();
    EXPECT_EQ(text(), "older");
    newer.publish();
    write(older, 0, "late!");
    EXPECT_EQ(text(), "newer");
  }
  EXPECT_THAT(names(), ElementsAre("x"));
}

TEST_F(ReplacementTest, WhatOlderStartsLeftAsideGoesAndWhatNewerOnesPrepareStays) {
  for (const char* name : {"x.e0001", "x.e0999", "x.e10000", "y.e0001"}) write_durable(real_fs(), dir_ / name, "");
  Replacement(real_fs(), path_, 1000, "new").publish();
  EXPECT_THAT(names(), ElementsAre("x", "x.e10000", "y.e0001"));
}

TEST_F(ReplacementTest, IsWholeWhereverAFaultComes) {
  for (int64_t k = 0;; ++k) {
    bool failed = false;
    FaultFs fs(real_fs(), [&](const std::string&, const std::string&, int64_t call) {
      return call == k ? Fault{.error_number = EIO, .short_bytes = 1} : Fault{};
    });
    try {
      Replacement(fs, path_, k + 1, "new" + std::to_string(k)).publish();
    } catch (const IoError&) {
      failed = true;
    }
    EXPECT_THAT(text(), testing::AnyOf("old", testing::StartsWith("new"))) << k;
    if (failed) continue;
    EXPECT_GT(k, 5);
    break;
  }
  EXPECT_THAT(names(), ElementsAre("x"));
}

}  // namespace
}  // namespace lockstep
