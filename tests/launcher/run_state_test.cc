#include "../../launcher/src/run_state.h"

#include <filesystem>
#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/format/manifest.h>

#include "../runtime/base/temp_dir.h"

namespace lockstep::launcher {
namespace {

namespace files = std::filesystem;
using testing::ElementsAre;
using testing::IsEmpty;

TEST(ProgramFlag, IsReadAsTheProgramReadsIt) {
  const TempDir folder;
  std::ofstream(folder / "inner.flags") << "--run_dir=inner\n";
  std::ofstream(folder / "outer.flags") << "# --run_dir=comment\n  --steps=4\n--flagfile=" << folder / "inner.flags"
                                        << "\n";
  const auto of = [](const std::vector<std::string>& words) { return program_flag(words, "run_dir").value_or("none"); };
  EXPECT_EQ(of({"gpt", "--run_dir=a"}), "a");
  EXPECT_EQ(of({"gpt", "-run_dir", "b"}), "b");
  EXPECT_EQ(of({"gpt", "--run-dir=c"}), "c");
  EXPECT_EQ(of({"gpt", "--run_dir=a", "--run_dir=d"}), "d");
  EXPECT_EQ(of({"gpt", "--run_dirs=a", "run_dir=b", "--run_dir"}), "none");
  EXPECT_EQ(of({"gpt", "--flagfile=" + folder / "outer.flags"}), "inner");
  EXPECT_EQ(of({"gpt", "--flagfile=" + folder / "outer.flags", "--run_dir=last"}), "last");
  EXPECT_EQ(of({"gpt", "--run_dir=first", "--flagfile", folder / "outer.flags"}), "inner");
  EXPECT_EQ(of({"gpt", "--flagfile=/no/such/file"}), "none");
  std::ofstream wide(folder / "wide.flags");  // each of its lines is the whole file again, but not for ever
  for (int line = 0; line < 90; ++line)
    wide << "--flagfile=" << folder / "wide.flags"
         << "\n";
  wide << "--run_dir=wide\n";
  wide.close();
  EXPECT_EQ(of({"gpt", "--flagfile=" + folder / "wide.flags"}), "wide");
}

TEST(ProgramRunDir, IsAbsoluteAndTheDefaultCountsOnceARunIsThere) {
  const TempDir folder;
  const files::path before = files::current_path();
  files::current_path(folder.path());
  const std::string here = files::current_path();
  EXPECT_EQ(program_run_dir({"gpt", "--run_dir=a/b//"}), here + "/a/b");
  EXPECT_EQ(program_run_dir({"gpt", "--run_dir=/"}), "/");
  EXPECT_EQ(program_run_dir({"gpt", "--steps=3"}), "");
  files::create_directory("run");
  EXPECT_EQ(program_run_dir({"gpt", "--steps=3"}), "") << "somebody's folder of that name";
  std::ofstream("run/run.json") << "{}";
  EXPECT_EQ(program_run_dir({"gpt", "--steps=3"}), here + "/run");
  files::current_path(before);
}

TEST(RunState, TheNewestWholeCheckpointCounts) {
  const TempDir run;
  EXPECT_EQ(newest_durable_step(""), -1);
  EXPECT_EQ(newest_durable_step(run.path()), -1);
  for (const int step : {3, 6, 9}) {
    const std::string folder = run / "checkpoints/" + format::directory_name(step, 1);
    files::create_directories(folder);
    if (step < 9) std::ofstream(folder + "/MANIFEST") << "x";  // the last save was cut off
  }
  EXPECT_EQ(newest_durable_step(run.path()), 6);
}

TEST(RunState, TheLastReportedStepIsTheLastWholeLines) {
  const TempDir run;
  EXPECT_EQ(last_reported_step(run.path()), std::nullopt);
  std::ofstream file(run / "metrics.jsonl");
  for (int step = 1; step <= 5000; ++step)
    file << "{\"step\":" << step << ",\"loss\":2.5,\"more\":\"" << std::string(40, 'x') << "\"}\n";
  file << "{\"step\":99999";
  file.close();
  EXPECT_EQ(last_reported_step(run.path()), 5000);
}

TEST(RunState, EffectiveTimeCountsEachStepOnceAndAsItWasDoneAtLast) {
  const TempDir run;
  EXPECT_EQ(seconds_in_steps(run.path(), -1, 100), 0);
  std::ofstream file(run / "metrics.jsonl");
  const auto report = [&](int step, double seconds) {
    file << "{\"step\":" << step << ",\"step_s\":" << seconds << "}\n";
  };
  for (int step = 1; step <= 6; ++step) report(step, 1);
  file << "rubbish\n{\"step\":7}\n{\"step\":\"7\",\"step_s\":99}\n{\"step_s\":99}\n";
  for (int step = 5; step <= 8; ++step) report(step, 2);  // a later start goes on from step 4
  for (int step = 10; step <= 14; step += 2) report(step, 3);
  file << "{\"step\":15,\"step_s\":99";
  file.close();
  EXPECT_EQ(seconds_in_steps(run.path(), -1, 8), 4 * 1 + 4 * 2);
  EXPECT_EQ(seconds_in_steps(run.path(), 6, 12), 2 * 2 + 4 * 3);
}

TEST(RunState, FaultyRanksAreThoseOfTheLastEntryAndOnlyIfCertain) {
  const TempDir run;
  const auto write = [&](const std::string& text) { std::ofstream(run / "ledger.jsonl", std::ios::trunc) << text; };
  EXPECT_THAT(faulty_ranks(run.path()), IsEmpty());
  write("{\"event\":\"start\"}\n{\"event\":\"replica_fault\",\"is_certain\":true,\"ranks\":[2]}\n");
  EXPECT_THAT(faulty_ranks(run.path()), ElementsAre(2));
  write("{\"event\":\"replica_fault\",\"is_certain\":false,\"ranks\":[1,2]}\n");
  EXPECT_THAT(faulty_ranks(run.path()), IsEmpty());
  write("{\"event\":\"replica_fault\",\"is_certain\":true,\"ranks\":[2]}\n{\"event\":\"resume\"}\n");
  EXPECT_THAT(faulty_ranks(run.path()), IsEmpty());
  write("{\"event\":5}\n");
  EXPECT_THAT(faulty_ranks(run.path()), IsEmpty());
  write("{\"event\":\"replica_fault\",\"is_certain\":\"so\",\"ranks\":[2]}\n");
  EXPECT_THAT(faulty_ranks(run.path()), IsEmpty());
}

TEST(SupervisorState, ANewSupervisorReadsWhatAnOldOneWrote) {
  const TempDir run;
  EXPECT_FALSE(load_supervisor_state(run.path()));
  SupervisorState state;
  state.policy = {2, 1, 40, {{7, "signal 6"}, {std::nullopt, "a hang"}}};
  state.refused = {7, 5};
  state.excluded = {"b"};
  state.starts = 3;
  state.job_id = "run-17";
  state.began_unix_s = 12.5;
  state.began_at = 30;
  state.owner = "lockstep-a.1.2.3.state";
  save_supervisor_state(run.path(), state);
  save_supervisor_state(run.path(), state);  // over the first
  const auto read = load_supervisor_state(run.path());
  ASSERT_TRUE(read);
  EXPECT_EQ(read->policy.restarts_used, 2);
  EXPECT_EQ(read->policy.cycles_without_progress, 1);
  EXPECT_EQ(read->policy.durable_step, 40);
  EXPECT_EQ(read->policy.seen, state.policy.seen);
  EXPECT_EQ(read->refused, state.refused);
  EXPECT_EQ(read->excluded, state.excluded);
  EXPECT_EQ(read->starts, 3);
  EXPECT_EQ(read->job_id, "run-17");
  EXPECT_EQ(read->owner, state.owner);
  EXPECT_EQ(read->began_unix_s, 12.5);
  EXPECT_EQ(read->began_at, 30);
  remove_supervisor_state(run.path());
  EXPECT_FALSE(load_supervisor_state(run.path()));
  EXPECT_TRUE(files::is_empty(run / "launch"));
}

TEST(SupervisorState, RubbishBeginsANewBudget) {
  const TempDir run;
  files::create_directory(run / "launch");
  for (const char* text : {"", "{", "{}", "[]", "{\"restarts_used\":\"x\"}"}) {
    std::ofstream(run / "launch/supervisor.json", std::ios::trunc) << text;
    EXPECT_FALSE(load_supervisor_state(run.path())) << text;
  }
}

TEST(SupervisorState, WithoutARunDirectoryNothingIsKept) {
  const TempDir run;
  save_supervisor_state("", {});
  save_supervisor_state(run / "none", {});
  EXPECT_TRUE(files::is_empty(run.path()));
}

}  // namespace
}  // namespace lockstep::launcher
