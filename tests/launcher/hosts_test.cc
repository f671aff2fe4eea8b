#include "../../launcher/src/hosts.h"

#include <chrono>
#include <fstream>
#include <map>

#include <sys/stat.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>

#include "../runtime/base/temp_dir.h"

namespace lockstep::launcher {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

using Hosts = std::vector<Host>;

TEST(HostList, NamesAndRanks) {
  EXPECT_EQ(parse_host_list("a:4,b:2"), (Hosts{{"a", 4}, {"b", 2}}));
  EXPECT_EQ(parse_host_list("gpu-01.site.org"), (Hosts{{"gpu-01.site.org", 1}}));
  EXPECT_EQ(parse_host_list("a,b:2,a:3"), (Hosts{{"a", 4}, {"b", 2}}));
}

TEST(HostList, MistakesNameTheMend) {
  for (const char* list : {"", ":4", "a:", "a:0", "a:-1", "a:x", "a:4:4", "a b", "-oProxyCommand=x:1", "a;b", "$(x)",
                           "a,,b", "a:99999999"})
    EXPECT_THROW(parse_host_list(list), ConfigError) << list;
}

TEST(Hostfile, IsOpenMpis) {
  const std::string text =
      "# the small ones\n\na slots=4\n  b\tslots=2  # two\nc\nc slots=1\nd slots=2 max_slots=9\r\n";
  EXPECT_EQ(parse_hostfile(text.substr(0, text.size() - 2), 8), (Hosts{{"a", 4}, {"b", 2}, {"c", 9}, {"d", 2}}));
}

TEST(Hostfile, MistakesNameTheLine) {
  try {
    parse_hostfile("a slots=4\nb slot=4\n", 8);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("'slot=4' in line 2"));
  }
  for (const char* text : {"", "# nothing\n", "a slots=0", "a slots=", "../a slots=1"})
    EXPECT_THROW(parse_hostfile(text, 8), ConfigError) << text;
}

TEST(Slurm, CountsUnfold) {
  EXPECT_THAT(parse_slurm_counts("4(x2),3"), ElementsAre(4, 4, 3));
  EXPECT_THAT(parse_slurm_counts("2"), ElementsAre(2));
  for (const char* text : {"x", "4(x)", "4(x0)", "4(x2", "4(2)", "-1", "4,,3", "1(x65536),1"})
    EXPECT_THROW(parse_slurm_counts(text), ConfigError) << text;
}

Environment of(std::map<std::string, std::string> variables) {
  return [variables = std::move(variables)](const char* name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  };
}

std::vector<std::string> three(const std::string& list) {
  EXPECT_EQ(list, "n[1-3]");
  return {"n1", "n2", "n3"};
}

TEST(Slurm, AnAllocationIsFound) {
  const std::map<std::string, std::string> job = {{"SLURM_JOB_ID", "7"}, {"SLURM_JOB_NODELIST", "n[1-3]"}};
  auto tasks = job;
  tasks.insert({{"SLURM_NTASKS", "8"}, {"SLURM_TASKS_PER_NODE", "3(x2),2"}, {"SLURM_JOB_CPUS_PER_NODE", "16(x3)"}});
  EXPECT_EQ(slurm_hosts(of(tasks), &three), (Hosts{{"n1", 3}, {"n2", 3}, {"n3", 2}}));
  auto cores = job;
  cores.insert({{"SLURM_TASKS_PER_NODE", "1(x3)"}, {"SLURM_JOB_CPUS_PER_NODE", "16(x3)"}});
  EXPECT_EQ(slurm_hosts(of(cores), &three), (Hosts{{"n1", 16}, {"n2", 16}, {"n3", 16}}));
  EXPECT_THAT(slurm_hosts(of({}), &three), IsEmpty());
  auto wrong = job;
  wrong.insert({"SLURM_JOB_CPUS_PER_NODE", "16(x2)"});
  EXPECT_THROW(slurm_hosts(of(wrong), &three), ConfigError);
}

TEST(Placement, FillsHostAfterHostAndKeepsSpares) {
  const auto placement = place({{"a", 4}, {"b", 4}, {"c", 4}}, 6, 6, {});
  ASSERT_TRUE(placement);
  EXPECT_EQ(placement->hosts, (Hosts{{"a", 4}, {"b", 2}}));
  EXPECT_EQ(placement->ranks(), 6);
  EXPECT_EQ(placement->describe(), "ranks 0-3 on a, 4-5 on b; spare: c");
}

TEST(Placement, ASpareTakesThePlaceOfALostHost) {
  EXPECT_EQ(place({{"a", 4}, {"c", 4}}, 8, 8, {})->hosts, (Hosts{{"a", 4}, {"c", 4}}));
}

TEST(Placement, TakesTheLargestWorldThatWasNotRefused) {
  const Hosts left = {{"a", 4}, {"b", 3}};
  EXPECT_EQ(place(left, 8, 4, {})->ranks(), 7);
  EXPECT_EQ(place(left, 8, 4, {7, 6})->ranks(), 5);
  EXPECT_EQ(place(left, 8, 4, {7, 6, 5, 4}), std::nullopt);
  EXPECT_EQ(place(left, 8, 8, {}), std::nullopt);
  EXPECT_EQ(place({}, 8, 0, {}), std::nullopt);
}

class Agent {
 public:
  explicit Agent(const std::string& body) {
    std::ofstream(path()) << "#!/bin/sh\n" << body;
    ::chmod(path().c_str(), 0700);
  }
  std::string path() const { return folder_ / "agent"; }

 private:
  TempDir folder_;
};

TEST(Answering, HostsThatAreGoneOrSilentAreLeftOut) {
  const Agent agent("[ $2 = true ] || exit 1\ncase $1 in gone) exit 255;; silent) sleep 60;; esac\n");
  const auto start = std::chrono::steady_clock::now();
  const Hosts found = answering({{"a", 1}, {"gone", 2}, {"silent", 3}, {"localhost", 4}, {"b", 5}}, {agent.path()}, 1);
  EXPECT_EQ(found, (Hosts{{"a", 1}, {"localhost", 4}, {"b", 5}}));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

TEST(Answering, WhatTheySayIsKeptAsLongAsItIsShort) {
  const Agent agent(
      "host=$1; shift; echo error >&2\n"
      "case $host in much) seq 100000;; fails) echo no; exit 1;; none) ;; *) echo $host says \"$@\";; esac\n");
  std::map<std::string, std::string> said;
  const Hosts hosts = {{"a", 1}, {"much", 1}, {"fails", 1}, {"none", 1}, {"localhost", 1}};
  const Hosts found = answering(hosts, {agent.path()}, 1, {"one", "two"}, &said);
  EXPECT_EQ(found, (Hosts{{"a", 1}, {"none", 1}, {"localhost", 1}}));
  EXPECT_THAT(said, ElementsAre(testing::Pair("a", "a says one two\n"), testing::Pair("none", "")));
}

TEST(Answering, WithoutAnAgentNoOtherHostAnswers) {
  EXPECT_EQ(answering({{"a", 1}, {"localhost", 1}}, {"/no/such/agent"}, 1), (Hosts{{"localhost", 1}}));
}

}  // namespace
}  // namespace lockstep::launcher
