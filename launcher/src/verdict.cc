#include "verdict.h"

#include <algorithm>
#include <csignal>

#include <sys/wait.h>

#include <lockstep/base/error.h>

#include "machine.h"

namespace lockstep::launcher {
namespace {

constexpr int kRunAgain = static_cast<int>(ExitCode::kRunAgain), kBug = static_cast<int>(ExitCode::kBug),
              kHang = static_cast<int>(ExitCode::kHang);
// mpirun 4.1's for a daemon that is gone, and ssh's for a connection that is.
constexpr int kDaemonGone = 205, kConnectionGone = 255;

struct Outcome {
  int exit_code = 0;
  Cause cause = Cause::kThrown;
};

// DESIGN 4: what a shell would call 128 + signal becomes a code that says what to do next.
Outcome outcome_of_signal(int signal, bool was_asked) {
  switch (signal) {
    case SIGKILL:
    case SIGTERM:
    case SIGINT:
    case SIGHUP:
      return {kRunAgain, Cause::kKilled};
    case SIGUSR1:  // our request met a rank that had not set its handler yet: nothing to save
      return was_asked ? Outcome{kRunAgain, Cause::kKilled} : Outcome{kBug, Cause::kThrown};
    default:
      return {kBug, Cause::kCrashed};
  }
}

Outcome outcome_of_exit(const Evidence& evidence) {
  const JobEnd& end = evidence.end;
  const int code = WIFEXITED(end.status) ? WEXITSTATUS(end.status) : 0;
  int signal = WIFSIGNALED(end.status) ? WTERMSIG(end.status) : 0;
  if (code > 128 && code < 128 + 32) signal = code - 128;  // mpirun says it so
  // mpirun 4.1 ends with 0 when it was told to end its ranks, so its 0 does not mean that they were done.
  if (end.was_ended_by_us) return {kRunAgain, Cause::kKilled};
  if (signal != 0) return outcome_of_signal(signal, end.was_asked);
  const bool lost = end.scan.lost_host() || code == kDaemonGone || code == kConnectionGone;
  if (evidence.on_several_hosts && lost && !evidence.done) return {kRunAgain, Cause::kLostHost};
  // mpirun's own trouble is always 1; a program's 1 is passed on.
  if (code == 1 && end.scan.could_not_start()) return {static_cast<int>(ExitCode::kConfig), Cause::kThrown};
  if (code == 0 && evidence.was_ready && evidence.done.value_or(kRunAgain) != 0)
    return {kRunAgain, evidence.done ? Cause::kThrown : Cause::kLostHost};
  // 75 is a peer's word on one that is gone, unless the ranks say below that it was something else.
  return {code, code == kRunAgain ? Cause::kKilled : Cause::kThrown};
}

// The record of the rank that began it: one that died by itself, else one that names a cause, else any.
const FailureRecord* root_of(const std::vector<FailureRecord>& failures) {
  const auto weight = [](const FailureRecord& record) {
    return record.signal != 0 ? 2 : record.exit_code != kRunAgain ? 1 : 0;
  };
  const auto found = std::max_element(failures.begin(), failures.end(),
                                      [&](const auto& a, const auto& b) { return weight(a) < weight(b); });
  return found == failures.end() ? nullptr : &*found;  // of equals the first rank
}

std::string say(const FailureRecord& record, bool with_host) {
  const std::string who = "rank " + std::to_string(record.rank) +
                          (with_host && !record.host.empty() ? " on " + record.host : std::string()),
                    when = record.step ? " at step " + std::to_string(*record.step) : "";
  return record.signal != 0 ? who + " " + record.message + when : who + when + ": " + record.message;
}

// mpirun's "rank 3 died by signal 9" with what the agents know of rank 3.
std::string say(const std::string& first_failure, const ClusterFinding& death) {
  const flight::Verdict& verdict = death.verdict;
  const std::string who = "rank " + std::to_string(verdict.culprits[0]);
  if (!first_failure.starts_with(who + " died") || verdict.hosts.empty()) return first_failure;
  return who + " on " + verdict.hosts[0] + first_failure.substr(who.size());
}

bool is_death(const ClusterFinding& finding) { return finding.verdict.cause == flight::Cause::kGone; }

// The watch has ended the job: what mpirun then says is the consequence.
Verdict verdict_of(const ClusterFinding& finding, const Evidence& evidence) {
  Verdict verdict;
  verdict.ending = {.exit_code = finding.exit_code,
                    .cause = finding.cause,
                    .was_asked = evidence.end.was_asked,
                    .was_ready = evidence.was_ready,
                    .signature = finding.exit_code == kHang && !is_death(finding) ? "a hang" : "",
                    .step = finding.step};
  verdict.first_failure = finding.verdict.message;
  return verdict;
}

std::string signature_of(const Outcome& outcome, int signal, bool out_of_memory) {
  if (outcome.cause == Cause::kCrashed) return "signal " + std::to_string(signal);
  if (outcome.exit_code == kHang) return "a hang";
  return out_of_memory ? "out of memory" : "";
}

}  // namespace

Verdict judge(const Evidence& evidence) {
  const JobEnd& end = evidence.end;
  const FailureRecord* root = root_of(evidence.failures);
  // Where mpirun is slow to end the others they come to hang on the one that crashed.
  const bool has_crashed = root && root->signal != 0 && !end.was_ended_by_us;
  if (evidence.finding && end.was_ended_by_watch && !(has_crashed && is_death(*evidence.finding)))
    return verdict_of(*evidence.finding, evidence);
  Outcome outcome = outcome_of_exit(evidence);
  Verdict verdict;
  if (outcome.exit_code == 0) return {{.was_asked = end.was_asked, .was_ready = evidence.was_ready}, std::nullopt};
  const bool has_cause = root && root->exit_code != kRunAgain && !end.was_ended_by_us;
  const bool is_consequence = outcome.exit_code == kRunAgain || (outcome.exit_code == kHang && has_crashed);
  if (has_cause && (is_consequence || outcome.exit_code == root->exit_code))
    outcome = {root->exit_code, has_crashed ? Cause::kCrashed : Cause::kThrown};
  int signal = WIFSIGNALED(end.status) ? WTERMSIG(end.status) : WEXITSTATUS(end.status) - 128;
  if (has_crashed) signal = root->signal;
  const bool stopped = evidence.done == kRunAgain;  // the ranks were asked, by us or by the batch system
  // Where the host of the rank that died is known, its kernel counts; else this machine's.
  const bool were_some_killed = evidence.death ? evidence.death->is_out_of_memory : evidence.out_of_memory_kills > 0;
  const bool out_of_memory = outcome.cause == Cause::kKilled && were_some_killed && !end.was_asked && !stopped;
  verdict.ending = {.exit_code = outcome.exit_code,
                    .cause = outcome.cause,
                    .was_asked = end.was_asked || (stopped && outcome.exit_code == kRunAgain),
                    .was_ready = evidence.was_ready,
                    .signature = signature_of(outcome, signal, out_of_memory),
                    .step = root ? root->step : std::nullopt};
  if (verdict.ending.was_asked && outcome.exit_code == kRunAgain) return verdict;  // they did as they were asked
  verdict.first_failure = end.scan.first_failure();
  if (has_cause || (root && !verdict.first_failure)) {
    verdict.first_failure = say(*root, evidence.on_several_hosts);
  } else if (WIFSIGNALED(end.status) && !evidence.under_mpirun) {
    verdict.first_failure = "the program died by signal " + std::to_string(signal) + " (" + signal_name(signal) + ")";
  } else if (!verdict.first_failure && outcome.cause == Cause::kLostHost) {
    verdict.first_failure = "a host or the connection to it is gone; mpirun ended before the ranks said they were done";
    if (evidence.loss) verdict.first_failure = evidence.loss->verdict.message;
  } else if (!verdict.first_failure && evidence.death) {
    verdict.first_failure = evidence.death->verdict.message;
  }
  if (evidence.death && verdict.first_failure) verdict.first_failure = say(*verdict.first_failure, *evidence.death);
  if (out_of_memory) {
    const std::string where = evidence.death && !evidence.death->verdict.hosts.empty()
                                  ? "host " + evidence.death->verdict.hosts[0]
                                  : "this machine";
    verdict.first_failure = verdict.first_failure.value_or("a rank was killed") + "; the kernel ended a process of " +
                            where + " for want of memory meanwhile";
  }
  return verdict;
}

}  // namespace lockstep::launcher
