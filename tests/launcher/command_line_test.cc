#include <filesystem>
#include <fstream>
#include <map>

#include <sys/stat.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "../runtime/base/temp_dir.h"
#include "lockstep_process.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

TEST(CommandLine, MistakesStopBeforeAnyWorkAndNameTheMend) {
  struct Case {
    std::vector<std::string> words;
    std::string said;
  };
  const Case cases[] = {
      {{}, ""},
      {{"rum"}, "run"},
      {{"run"}, "no program is named"},
      {{"run", "-n", "2"}, "no program is named"},
      {{"run", "-n", "2", "--"}, "no program is named"},
      {{"run", "-n", "2", "/bin/true"}, "put -- before the program"},
      {{"run", "-n"}, "needs a value"},
      {{"run", "-n", "two", "--", "true"}, "whole number"},
      {{"run", "-n", "0", "--", "true"}, "whole number"},
      {{"run", "-n", "-3", "--", "true"}, "whole number"},
      {{"run", "-n", "1.5", "--", "true"}, "whole number"},
      {{"run", "-n", "99999999999999999999", "--", "true"}, "whole number"},
      {{"run", "--grace", "3", "--", "true"}, "--grace_s"},
      {{"run", "--grace_s=-1", "--", "true"}, "whole number"},
      {{"run", "--tag_output=yes", "--", "true"}, "is a switch"},
      {{"run", "--restarts", "-1", "--", "true"}, "whole number"},
      {{"run", "--restart", "3", "--", "true"}, "--restarts"},
      {{"run", "--hosts", "a:4", "--hostfile", "f", "--", "true"}, "one of them"},
      {{"run", "--hosts", "-oProxyCommand=x", "--", "true"}, "no host name"},
      {{"run", "--hosts", "a:x", "--", "true"}, "a:4,b:4"},
      {{"run", "--hostfile", "/no/such/file", "--", "true"}, "/no/such/file"},
      {{"run", "-n", "9", "--hosts", "a:4,b:4", "--", "true"}, "more hosts"},
      {{"run", "-n", "2", "--min_ranks", "3", "--", "true"}, "whole number"},
      {{"run", "-n", "1", "--bind_to", "socket", "--", "true"}, "neither core nor none"},
      {{"run", "-n", "500", "--bind_to", "core", "--", "true"}, "fewer ranks"},
      {{"run", "-n", "2", "--", "/no/such/program"}, "/no/such/program"},
      {{"run", "-n", "1", "--", "no-such-program-on-path"}, "no-such-program-on-path"},
      {{"run", "-n", "1", "--", "/etc/passwd"}, "cannot be executed"},
      {{"run", "-n", "1", "--", "/tmp"}, "cannot be executed"},
      {{"run", "-n", "2", "--mpirun", "/no/mpirun", "--", "/bin/true"}, "/no/mpirun"},
      {{"inspect"}, "one checkpoint or run is needed"},
      {{"inspect", "a", "b"}, "one checkpoint or run is needed"},
      {{"inspect", "/no/such/folder"}, "/no/such/folder"},
      {{"inspect", "--jsn", "a"}, "--json"},
      {{"verify", "/tmp"}, "/tmp"},
      {{"doctor", "me"}, "leftover"},
      {{"doctor", "--short", "--hosts", "a"}, "this machine alone"},
  };
  for (const Case& wrong : cases) {
    const Ended ended = lockstep_run(wrong.words);
    const std::string line = testing::PrintToString(wrong.words);
    EXPECT_EQ(ended.code, 78) << line << ended.err;
    EXPECT_THAT(ended.err, HasSubstr(wrong.said)) << line;
  }
}

TEST(CommandLine, HelpIsNoMistake) {
  for (const std::vector<std::string>& words : std::vector<std::vector<std::string>>{
           {"--help"}, {"help"}, {"run", "--help"}, {"run", "-n", "2", "--help"}, {"doctor", "-h"}}) {
    const Ended ended = lockstep_run(words);
    EXPECT_EQ(ended.code, 0);
    EXPECT_EQ(ended.err, "");
    EXPECT_THAT(ended.out, HasSubstr(words[0] == "run" ? "--grace_s" : words[0] == "doctor" ? "--run_dir" : "inspect"));
  }
}

TEST(CommandLine, AProgramThatCannotBeLoadedIsAMatterOfSetUp) {
  const TempDir folder;
  const std::string program = folder / "no program";
  std::ofstream(program) << "\x7f"
                            "ELF rubbish";
  ASSERT_EQ(::chmod(program.c_str(), 0700), 0);
  const Ended ended = lockstep_run({"run", "-n", "1", "--", program});
  EXPECT_EQ(ended.code, 78) << ended.err;
  EXPECT_THAT(ended.err, HasSubstr("cannot execute"));
}

TEST(Doctor, SaysWhatIsThereAndMarksWhatIsNot) {
  const TempDir folder;
  const Ended ended = lockstep_run({"doctor", "--json", "--run_dir", folder / "missing", "--program", kRank});
  EXPECT_EQ(ended.code, 78) << ended.err;
  std::map<std::string, bool> good;
  for (const auto& finding : nlohmann::json::parse(ended.out)) {
    good[finding["what"]] = finding["good"];
    EXPECT_NE(finding["found"], "");
    const std::string found = finding["found"];
    if (finding["what"] == "NCCL") {
      EXPECT_EQ(found.starts_with("left out"),
                !std::filesystem::exists(LOCKSTEP_BINARY_DIR "/lib/liblockstep_cuda.so"));
    }
    EXPECT_EQ(finding["good"] == true, finding["mend"] == "") << finding;
  }
  EXPECT_TRUE(good.at("Open MPI"));
  EXPECT_TRUE(good.at("2 ranks start"));
  EXPECT_TRUE(good.at("libraries of launched_rank"));
  EXPECT_FALSE(good.at("storage of " + folder / "missing"));
  for (const char* what : {"GPU", "NCCL", "cores", "memory", "/dev/shm", "open files", "locked memory", "clock"})
    EXPECT_TRUE(good.contains(what)) << what;
}

TEST(Doctor, TheShortLookIsWhatAStartNeeds) {
  const TempDir folder;
  const Ended ended = lockstep_run({"doctor", "--short", "--json", "--run_dir", folder / "not/yet"});
  EXPECT_EQ(ended.code, 0) << ended.out;
  std::vector<std::string> what;
  for (const auto& finding : nlohmann::json::parse(ended.out)) what.push_back(finding["what"]);
  EXPECT_THAT(what, testing::ElementsAre("memory", "/dev/shm", "open files", "clock", testing::EndsWith("/not/yet")));
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Doctor, LeavesNothingInTheFolderItMeasures) {
  const TempDir folder;
  lockstep_run({"doctor", "--run_dir", folder.path()});
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Doctor, MissesAnMpirunThatIsNotThere) {
  const Ended ended = lockstep_run({"doctor"}, {{"PATH", "/nowhere"}});
  EXPECT_EQ(ended.code, 78);
  EXPECT_THAT(ended.out, HasSubstr("BAD   Open MPI: no mpirun on PATH"));
  EXPECT_THAT(ended.out, HasSubstr("mend: apt-get install openmpi-bin"));
}

}  // namespace
}  // namespace lockstep
