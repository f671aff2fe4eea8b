#include "../../launcher/src/verdict.h"

#include <csignal>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep::launcher {
namespace {

using testing::HasSubstr;

constexpr int exited(int code) { return code << 8; }  // waitpid's status

Evidence under_mpirun(int status, const std::string& said = "") {
  Evidence evidence{.under_mpirun = true, .was_ready = true};
  evidence.end.status = status;
  evidence.end.scan.feed(said);
  return evidence;
}

FailureRecord record(int rank, int code, const std::string& message, int signal = 0) {
  return {.rank = rank, .exit_code = code, .signal = signal, .message = message, .host = "b", .step = 7};
}

TEST(Verdict, WithoutDoneAZeroIsALostHost) {
  Evidence evidence = under_mpirun(exited(0));
  Verdict verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 75);
  EXPECT_EQ(verdict.ending.cause, Cause::kLostHost);
  EXPECT_THAT(verdict.first_failure.value_or(""), HasSubstr("a host or the connection"));
  evidence.done = 0;
  EXPECT_EQ(judge(evidence).ending.exit_code, 0);
  evidence.done.reset();
  evidence.was_ready = false;  // no program of ours
  EXPECT_EQ(judge(evidence).ending.exit_code, 0);
}

TEST(Verdict, WhatTheRanksWroteIsTheCauseAndNotWhatFollowed) {
  Evidence evidence = under_mpirun(exited(75));
  evidence.failures = {record(0, 75, "peer lost"), record(2, 70, "died by signal 11 (Segmentation fault)", SIGSEGV),
                       record(3, 74, "disk full")};
  const Verdict verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 70);
  EXPECT_EQ(verdict.ending.cause, Cause::kCrashed);
  EXPECT_EQ(verdict.ending.signature, "signal 11");
  EXPECT_EQ(verdict.ending.step, 7);
  EXPECT_EQ(verdict.first_failure, "rank 2 died by signal 11 (Segmentation fault) at step 7");
}

TEST(Verdict, APeersWordOnAKilledRankIsNoCause) {
  Evidence evidence = under_mpirun(
      exited(137), "mpirun noticed that process rank 1 with PID 0 on node n exited on signal 9 (Killed).\n");
  evidence.failures = {record(0, 75, "peer lost")};
  const Verdict verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 75);
  EXPECT_EQ(verdict.ending.cause, Cause::kKilled);
  EXPECT_EQ(verdict.ending.signature, "");
  EXPECT_EQ(verdict.first_failure, "rank 1 died by signal 9 (Killed)");
}

TEST(Verdict, AKillForWantOfMemoryIsNamedAndRemembered) {
  Evidence evidence = under_mpirun(exited(137));
  evidence.out_of_memory_kills = 1;
  const Verdict verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 75);
  EXPECT_EQ(verdict.ending.signature, "out of memory");
  EXPECT_THAT(verdict.first_failure.value_or(""), HasSubstr("want of memory"));
}

TEST(Verdict, OnSeveralHostsItNamesTheHost) {
  Evidence evidence = under_mpirun(exited(74));
  evidence.on_several_hosts = true;
  evidence.failures = {record(5, 74, "disk full")};
  EXPECT_EQ(judge(evidence).first_failure, "rank 5 on b at step 7: disk full");
}

TEST(Verdict, DaemonsAndConnectionsAreHosts) {
  for (const int code : {205, 255}) {
    Evidence evidence = under_mpirun(exited(code));
    EXPECT_EQ(judge(evidence).ending.exit_code, code) << "a program's own, on one host";
    evidence.on_several_hosts = true;
    EXPECT_EQ(judge(evidence).ending.exit_code, 75);
    EXPECT_EQ(judge(evidence).ending.cause, Cause::kLostHost);
  }
  Evidence evidence = under_mpirun(exited(1), "ORTE has lost communication with a remote daemon.\n");
  evidence.on_several_hosts = true;
  EXPECT_EQ(judge(evidence).ending.cause, Cause::kLostHost);
}

TEST(Verdict, WhoeverAskedTheRanksToStopTheyStopped) {
  Evidence evidence = under_mpirun(exited(75));
  evidence.done = 75;
  EXPECT_TRUE(judge(evidence).ending.was_asked);
  EXPECT_EQ(judge(evidence).first_failure, std::nullopt);
}

TEST(Verdict, AHangIsRememberedByItsStep) {
  Evidence evidence = under_mpirun(exited(76));
  evidence.failures = {record(0, 76, "rank 3 never came")};
  const Ending ending = judge(evidence).ending;
  EXPECT_EQ(ending.exit_code, 76);
  EXPECT_EQ(ending.signature, "a hang");
  EXPECT_EQ(ending.step, 7);
}

TEST(Verdict, ACrashThatPeersCameToHangOnIsACrash) {
  Evidence evidence = under_mpirun(exited(76));
  evidence.failures = {record(0, 70, "died by signal 11 (Segmentation fault)", SIGSEGV), record(1, 76, "0 is gone")};
  const Verdict verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 70);
  EXPECT_EQ(verdict.ending.cause, Cause::kCrashed);
  EXPECT_EQ(verdict.ending.signature, "signal 11") << "a hang at the same step later is another failure";
  EXPECT_EQ(verdict.first_failure, "rank 0 died by signal 11 (Segmentation fault) at step 7");
}

TEST(Verdict, RanksThatWereEndedAfterTheGraceCountAsStopped) {
  Evidence evidence = under_mpirun(exited(0));
  evidence.end.was_asked = evidence.end.was_ended_by_us = true;
  evidence.failures = {record(1, 70, "died by signal 6 (Aborted)", SIGABRT)};
  const Verdict verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 75);
  EXPECT_TRUE(verdict.ending.was_asked);
}

ClusterFinding finding(int exit_code, Cause cause, const std::string& message,
                       const std::vector<std::string>& hosts = {"n3"}) {
  return {.exit_code = exit_code,
          .cause = cause,
          .verdict = {.culprits = {2}, .hosts = hosts, .message = message},
          .step = 12};
}

TEST(Verdict, WhatTheWatchFoundIsTheCauseAndNotWhatMpirunSaysWhenItIsEnded) {
  Evidence evidence = under_mpirun(exited(0), "mpirun: daemon has unexpectedly failed\n");
  evidence.on_several_hosts = true;
  evidence.end.was_ended_by_watch = true;
  evidence.finding = finding(76, Cause::kThrown, "rank 2 (host n3, pid 7) is stopped");
  Verdict verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 76);
  EXPECT_EQ(verdict.ending.signature, "a hang");
  EXPECT_EQ(verdict.ending.step, 12);
  EXPECT_EQ(verdict.first_failure, "rank 2 (host n3, pid 7) is stopped");
  evidence.finding = finding(75, Cause::kLostHost, "host n3 is silent");
  verdict = judge(evidence);
  EXPECT_EQ(verdict.ending.exit_code, 75);
  EXPECT_EQ(verdict.ending.cause, Cause::kLostHost);
  EXPECT_EQ(verdict.ending.signature, "") << "a host that is lost twice says nothing";
  evidence.end.was_ended_by_watch = false;  // it ended by itself, just before
  EXPECT_EQ(judge(evidence).first_failure.value_or("").find("host n3"), std::string::npos);
}

TEST(Verdict, ADeadRankThatTheWatchEndedTheJobForIsNoHang) {
  Evidence evidence = under_mpirun(exited(76));
  evidence.on_several_hosts = true;
  evidence.end.was_ended_by_watch = true;
  evidence.finding = finding(76, Cause::kThrown, "rank 2 (host n3, pid 7) is gone");
  evidence.finding->verdict.cause = flight::Cause::kGone;
  EXPECT_EQ(judge(evidence).ending.exit_code, 76);
  EXPECT_EQ(judge(evidence).ending.signature, "") << "a kill that is repeated says nothing";
  evidence.failures = {record(2, 70, "died by signal 11 (Segmentation fault)", SIGSEGV)};
  EXPECT_EQ(judge(evidence).ending.signature, "signal 11");
  evidence.finding->verdict.cause = flight::Cause::kNeverArrived;  // what then crashes did so because it was ended
  EXPECT_EQ(judge(evidence).ending.signature, "a hang");
}

TEST(Verdict, ADeadRankHasItsHostAndThatHostsKernelCounts) {
  const std::string said = "mpirun noticed that process rank 2 with PID 7 on node n3 exited on signal 9 (Killed).\n";
  Evidence evidence = under_mpirun(exited(137), said);
  evidence.on_several_hosts = true;
  evidence.death = finding(75, Cause::kKilled, "rank 2 (host n3, pid 7) is gone");
  evidence.out_of_memory_kills = 1;  // of this machine, where rank 2 is not
  EXPECT_EQ(judge(evidence).first_failure, "rank 2 on n3 died by signal 9 (Killed)");
  EXPECT_EQ(judge(evidence).ending.signature, "");
  evidence.death->is_out_of_memory = true;
  EXPECT_EQ(
      judge(evidence).first_failure,
      "rank 2 on n3 died by signal 9 (Killed); the kernel ended a process of host n3 for want of memory meanwhile");
  EXPECT_EQ(judge(evidence).ending.signature, "out of memory");
  EXPECT_EQ(evidence.end.scan.dead_rank(), 2);
  EXPECT_EQ(under_mpirun(exited(1)).end.scan.dead_rank(), std::nullopt);
}

TEST(Verdict, AHostThatMpirunLostIsNamedByTheWatch) {
  Evidence evidence = under_mpirun(exited(205));
  evidence.on_several_hosts = true;
  EXPECT_THAT(judge(evidence).first_failure.value_or(""), HasSubstr("a host or the connection"));
  evidence.loss = finding(75, Cause::kLostHost, "host n3 is silent");
  EXPECT_EQ(judge(evidence).first_failure, "host n3 is silent");
}

}  // namespace
}  // namespace lockstep::launcher
