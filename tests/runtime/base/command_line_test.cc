#include <fstream>

#include <gflags/gflags.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/command_line.h>
#include <lockstep/base/error.h>
#include <lockstep/base/text.h>

#include "temp_dir.h"

DEFINE_int64(test_steps, 10, "how long");
DEFINE_bool(test_share, true, "whether");
DEFINE_string(test_name, "", "what");
DEFINE_double(test_rate, 0.5, "how fast");

namespace lockstep {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const std::vector<FlagSection> kSections = {{"of the test", __FILE__}};

std::vector<std::string> parse(std::vector<std::string> words) {
  words.insert(words.begin(), "program");
  std::vector<char*> argv;
  argv.reserve(words.size());
  for (std::string& word : words) argv.push_back(word.data());
  return parse_command_line(static_cast<int>(argv.size()), argv.data(), "tests", kSections);
}

std::string refusal(const std::vector<std::string>& words) {
  try {
    parse(words);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "taken";
}

class CommandLineTest : public testing::Test {
  gflags::FlagSaver saver_;
};

TEST_F(CommandLineTest, AllWaysToSayAFlagAreHeard) {
  EXPECT_THAT(parse({"--test_steps=20", "word", "--test_rate", "-2.5", "--notest_share", "-test-name=a=b", "-"}),
              ElementsAre("word", "-"));
  EXPECT_EQ(FLAGS_test_steps, 20);
  EXPECT_EQ(FLAGS_test_rate, -2.5);
  EXPECT_FALSE(FLAGS_test_share);
  EXPECT_EQ(FLAGS_test_name, "a=b");
  parse({"--test_share", "--test_steps=30", "--test_steps=40"});
  EXPECT_TRUE(FLAGS_test_share);
  EXPECT_EQ(FLAGS_test_steps, 40) << "the last one counts";
}

TEST_F(CommandLineTest, MistakesAreRefusedWithAMend) {
  EXPECT_THAT(refusal({"--test_step=3"}), AllOf(HasSubstr("--test_step"), HasSubstr("did you mean --test_steps?")));
  EXPECT_THAT(refusal({"--test_steps=many"}), AllOf(HasSubstr("many"), HasSubstr("int64"), HasSubstr("how long")));
  EXPECT_THAT(refusal({"--test_steps"}), HasSubstr("needs a value"));
  EXPECT_THAT(refusal({"--notest_steps"}), HasSubstr("unknown flag"));
  EXPECT_THAT(refusal({"--flagfile=/absent/file"}), HasSubstr("/absent/file"));
  EXPECT_THAT(refusal({"--entirely_else=1"}), HasSubstr("see --help"));
}

TEST_F(CommandLineTest, FilesHoldFlagsAndOtherFilesButNotEndlessly) {
  const TempDir dir;
  std::ofstream(dir / "inner") << "# a recipe\n\n  --test_steps=7 \r\n--test_name=from inner\n";
  std::ofstream(dir / "outer") << "--flagfile=" << (dir / "inner") << "\n--test_rate=3\n";
  std::ofstream(dir / "self") << "--flagfile=" << (dir / "self") << "\n";
  parse({"--flagfile=" + dir / "outer", "--test_rate=4"});
  EXPECT_EQ(FLAGS_test_steps, 7);
  EXPECT_EQ(FLAGS_test_name, "from inner");
  EXPECT_EQ(FLAGS_test_rate, 4) << "what follows the file counts";
  EXPECT_THAT(refusal({"--flagfile=" + dir / "self"}), HasSubstr("nested"));
  EXPECT_THAT(refusal({"--flagfile=" + dir.path()}), HasSubstr("cannot be read"));
  std::ofstream(dir / "zero") << "--test_name=a" << '\0' << "b\n";
  EXPECT_THAT(refusal({"--flagfile=" + dir / "zero"}), HasSubstr("--test_name"));
  EXPECT_THAT(refusal(std::vector<std::string>(101, "--flagfile=" + dir / "inner")), HasSubstr("more than 100 files"));
}

TEST_F(CommandLineTest, TheRecordOfARunTakesTheSameFlagsBack) {
  parse({"--test_steps=77", "--notest_share"});
  const std::string record = resolved_flags(kSections);
  EXPECT_THAT(record, AllOf(HasSubstr("--test_steps=77\n"), HasSubstr("--test_share=false\n")));
  const TempDir dir;
  std::ofstream(dir / "record") << record;
  parse({"--test_steps=1", "--test_share", "--flagfile=" + dir / "record"});
  EXPECT_EQ(resolved_flags(kSections), record);
}

TEST_F(CommandLineTest, HelpShowsTheSectionsAndEndsWell) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        dup2(2, 1);
        parse({"--nonsense", "--help"});
      },
      testing::ExitedWithCode(0), AllOf(HasSubstr("of the test"), HasSubstr("--test_steps=10"), HasSubstr("how long")));
}

TEST(DidYouMeanTest, OnlyALikelySlipIsOffered) {
  EXPECT_EQ(did_you_mean("stpes", {"seed", "steps"}, "--"), ". Mend: did you mean --steps?");
  EXPECT_EQ(did_you_mean("checkpoint", {"seed", "steps"}), ". Mend: see --help");
  EXPECT_EQ(did_you_mean("seed", {}), ". Mend: see --help");
}

}  // namespace
}  // namespace lockstep
