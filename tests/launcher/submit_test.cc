#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <sys/stat.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../runtime/base/temp_dir.h"
#include "lockstep_process.h"

// `lockstep submit` without Slurm: its scripts run in a plain bash, and small scripts stand for sbatch and scontrol.
// tests/cluster/slurm_test.py has the real ones.
namespace lockstep {
namespace {

namespace files = std::filesystem;
using testing::ElementsAreArray;
using testing::HasSubstr;
using testing::Not;

std::string content(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

class Submit : public testing::Test {
 protected:
  Submit() { files::create_directory(folder_ + "/bin"); }

  void put(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ + "/" + name) << text;
    ::chmod((folder_ + "/" + name).c_str(), 0755);
  }
  void put_command(const std::string& name, const std::string& text) const { put("bin/" + name, "#!/bin/sh\n" + text); }
  Ended submit(const std::vector<std::string>& words) const {
    std::vector<std::string> line = {"submit"};
    line.insert(line.end(), words.begin(), words.end());
    return lockstep_run(line, {{"PATH", path_}});
  }
  /// Runs the script that `submit --dry_run` prints. @return its exit code.
  int run_script(const std::vector<std::string>& words, const std::string& environment = "") const {
    std::vector<std::string> line = {"--dry_run"};
    line.insert(line.end(), words.begin(), words.end());
    const Ended ended = submit(line);
    EXPECT_EQ(ended.code, 0) << ended.err;
    put("script", ended.out);
    const std::string command = "PATH='" + path_ + "' " + environment + " timeout 60 bash '" + folder_ + "/script'";
    return WEXITSTATUS(std::system(command.c_str()));  // NOLINT(concurrency-mt-unsafe): one thread
  }

  TempDir temp_;
  const std::string folder_ = temp_.path();
  const std::string path_ = folder_ + "/bin:" + std::getenv("PATH");  // NOLINT(concurrency-mt-unsafe): one thread
};

TEST_F(Submit, EveryWordReachesTheProgramAsItWasGiven) {
  put("program", "#!/bin/bash\nprintf '%s\\0' \"$@\" > '" + folder_ + "/words'\n");
  const std::vector<std::string> words = {"it's", "\"",  "$HOME ${PATH} $(id) `id` !!",
                                          "\\",   "\\'", "new\nline",
                                          "",     " ",   "*",
                                          "~",    "#",   "%a",
                                          "-n",   "--",  "ü",
                                          "''",   "EOF"};
  std::vector<std::string> line = {"--", folder_ + "/program"};
  line.insert(line.end(), words.begin(), words.end());
  EXPECT_EQ(run_script(line), 0);
  std::vector<std::string> found;
  std::istringstream text(content(folder_ + "/words"));
  for (std::string word; std::getline(text, word, '\0');) found.push_back(word);
  EXPECT_THAT(found, ElementsAreArray(words));
}

TEST_F(Submit, TasksOfAnArrayHaveTheirOwnWords) {
  put("program", "#!/bin/sh\necho \"$1\" > '" + folder_ + "'/words\n");
  EXPECT_EQ(run_script({"--array=0-7%2", "--", folder_ + "/program", "it's %a/%a", "--run_dir=" + folder_ + "/r%a"},
                       "SLURM_ARRAY_TASK_ID=5"),
            0);
  EXPECT_EQ(content(folder_ + "/words"), "it's 5/5\n");
}

// A program that plays Slurm: it signals the batch script, which is lockstep's parent, and stops as a run does.
constexpr const char* kStops = R"(#!/bin/bash
trap 'exit 75' USR1
echo {} > "$LOCKSTEP_LAUNCH_DIR/ready"
kill -$1 $(ps -o ppid= $PPID)
while :; do sleep 0.1; done
)";

TEST_F(Submit, AJobThatStoppedAndSavedGoesBackIntoTheQueueUntilItsBudgetIsSpent) {
  put_command("scontrol", "echo \"$@\" >> '" + folder_ + "/asked'\n");
  put("stops", kStops);
  const std::vector<std::string> stops = {"--max_requeues=3", "--", folder_ + "/stops", "USR1"};
  EXPECT_EQ(run_script(stops, "SLURM_JOB_ID=17 SLURM_RESTART_COUNT=2"), 75);
  EXPECT_EQ(content(folder_ + "/asked"), "requeue 17\n");
  EXPECT_EQ(run_script(stops, "SLURM_JOB_ID=18 SLURM_ARRAY_JOB_ID=17 SLURM_ARRAY_TASK_ID=4"), 75);
  EXPECT_EQ(content(folder_ + "/asked"), "requeue 17\nrequeue 17_4\n");
  EXPECT_EQ(run_script(stops, "SLURM_JOB_ID=17 SLURM_RESTART_COUNT=3"), 77);
  EXPECT_EQ(run_script({"--", "/bin/sh", "-c", "exit 65"}, "SLURM_JOB_ID=17"), 65);
  EXPECT_EQ(content(folder_ + "/asked"), "requeue 17\nrequeue 17_4\n");
}

TEST_F(Submit, AWarningAsksTheProgramToSaveAndACancelledJobStaysCancelled) {
  put_command("scontrol", "echo \"$@\" >> '" + folder_ + "/asked'\n");
  put("stops", kStops);
  EXPECT_EQ(run_script({"--", folder_ + "/stops", "USR1"}, "SLURM_JOB_ID=17"), 75);
  EXPECT_EQ(content(folder_ + "/asked"), "requeue 17\n");
  EXPECT_EQ(run_script({"--", folder_ + "/stops", "TERM"}, "SLURM_JOB_ID=17"), 75);
  EXPECT_EQ(content(folder_ + "/asked"), "requeue 17\n");
}

TEST_F(Submit, TheWarningComesInTimeForWhatASaveTook) {
  files::create_directory(folder_ + "/run");
  const auto warning = [&](const std::vector<std::string>& flags) {
    std::vector<std::string> line = {"--dry_run"};
    line.insert(line.end(), flags.begin(), flags.end());
    line.insert(line.end(), {"--", "/bin/true", "--run_dir", folder_ + "/run"});
    const std::string text = submit(line).out;
    const size_t at = text.find("USR1@");
    return at == std::string::npos ? text : text.substr(at + 5, text.find('\n', at) - at - 5);
  };
  EXPECT_EQ(warning({}), "90");
  std::ofstream(folder_ + "/run/ledger.jsonl")
      << "{\"event\":\"durable\",\"save_s\":3}\n{\"event\":\"durable\",\"save_s\":100.5}\n"
         "{\"event\":\"end\"}\nnot JSON \"save_s\"\n";
  EXPECT_EQ(warning({}), "231");  // 30 + 2 x 100.5
  std::ofstream(folder_ + "/run/metrics.jsonl") << "{\"step\":1,\"step_s\":7}\n";
  EXPECT_EQ(warning({}), "245");
  EXPECT_EQ(warning({"--grace_s=20"}), "20");
}

TEST_F(Submit, PrintsTheJobsNumberAndKeepsTheScriptInTheRun) {
  put_command("sbatch", "echo \"$@\" > '" + folder_ + "/asked'\necho 'sbatch: a hint' >&2\necho '42;cluster'\n");
  std::ofstream(folder_ + "/flags") << "--steps=3\n--run_dir=" << folder_ << "/run\n";
  const Ended ended =
      submit({"--time=2:00:00", "--partition=a,b", "--", "/bin/true", "--flagfile=" + folder_ + "/flags"});
  EXPECT_EQ(ended.code, 0) << ended.err;
  EXPECT_EQ(ended.out, "42\n");
  EXPECT_THAT(ended.err, HasSubstr("a hint"));
  const std::string script = folder_ + "/run/true.sbatch";
  EXPECT_EQ(content(folder_ + "/asked"), "--parsable " + script + "\n");
  EXPECT_THAT(content(script), HasSubstr("#SBATCH --time=2:00:00\n#SBATCH --partition=a,b\n#SBATCH --output=" +
                                         folder_ + "/run/slurm-%j.out\n"));
  struct stat status {};
  ASSERT_EQ(::stat(script.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600);
  ASSERT_EQ(::stat((folder_ + "/run").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700);
}

TEST_F(Submit, MistakesAreNamedWithTheirMendAndReachNoScript) {
  put_command("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n");
  struct Case {
    std::vector<std::string> words;
    std::string said;
  };
  const Case cases[] = {
      {{}, "no program is named"},
      {{"/bin/true"}, "put -- before the program"},
      {{"--", "/no/such"}, "/no/such"},
      {{"--nodes=0", "--", "/bin/true"}, "whole number"},
      {{"--job_name=a\n#SBATCH --x", "--", "/bin/true"}, "--job_name"},
      {{"--job_name=$(id)", "--", "/bin/true"}, "letters, digits"},
      {{"--partition=a b", "--", "/bin/true"}, "--partition"},
      {{"--account=", "--", "/bin/true"}, "--account"},
      {{"--time=soon", "--", "/bin/true"}, "2:00:00"},
      {{"--time=1", "--grace_s=60", "--", "/bin/true"}, "a longer --time"},
      {{"--time=1:30", "--", "/bin/true"}, "a longer --time"},
      {{"--array=0-3;", "--", "/bin/true", "--run_dir=%a"}, "--array"},
      {{"--array=0-3", "--", "/bin/true", "--run_dir=same"}, "--run_dir=sweep/%a"},
      {{"--", "/bin/true", "--run_dir=" + folder_ + "/run"}, "invalid partition"},
  };
  for (const Case& wrong : cases) {
    const Ended ended = submit(wrong.words);
    EXPECT_EQ(ended.code, 78) << testing::PrintToString(wrong.words) << ended.err;
    EXPECT_THAT(ended.err, HasSubstr(wrong.said)) << testing::PrintToString(wrong.words);
    EXPECT_EQ(ended.out, "");
  }
  for (const char* fine : {"1-0", "0-0:1:31", "2:00", "2"}) {
    const Ended ended = submit({"--dry_run", "--time", fine, "--", "/bin/true"});
    EXPECT_EQ(ended.code, 0) << fine << ended.err;
  }
}

}  // namespace
}  // namespace lockstep
