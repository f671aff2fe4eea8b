// The hidden verb `agent`: one a node, started by local rank 0 (collectives/src/agent_start.h). Watches the rings of
// the node's ranks from outside, so that one that is stopped, or hangs where no thread of it moves, is found too. On
// several hosts it reports to the supervisor, which decides; one that does not reach it decides for its node.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>
#include <lockstep/flight/verdict.h>

#include "hang_record.h"
#include "hosts.h"
#include "run_state.h"
#include "supervisor_link.h"
#include "verbs.h"

namespace lockstep::launcher {
namespace {

using flight::Cause;
using flight::Liveness;
using flight::NodeReport;
using flight::RankReport;
using flight::RingReader;
using flight::Verdict;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kTick{200}, kAfterADeath{100}, kOthersCome{600};
constexpr std::chrono::seconds kRanksCome{60}, kStragglerPause{60};
constexpr size_t kTail = 256;  // calls looked at in each tick
constexpr milliseconds kOthersCall{200};
constexpr milliseconds kStackTakes{400};     // a rank's answer to SIGUSR2
constexpr milliseconds kOthersDecide{1000};  // what only another node can know is waited for
constexpr milliseconds kRanksEnd{1500};      // what is told to end, and does not, is killed
constexpr milliseconds kHeartbeat{500}, kReport{500}, kLastWords{300};
constexpr std::chrono::seconds kJobEnds{10};  // else this node is watched on, as without a supervisor

void pause(milliseconds time) { ::poll(nullptr, 0, static_cast<int>(time.count())); }

struct Watched {
  std::unique_ptr<RingReader> ring;
  UniqueFd process;  // readable once it has ended; -1 where the kernel lacks pidfds
  bool is_gone = false;
};

class Agent {
 public:
  Agent(std::string job, size_t num_ranks, std::string launch_folder)
      : job_(std::move(job)), num_ranks_(num_ranks), launch_folder_(std::move(launch_folder)), link_(launch_folder_) {}
  int run();

 private:
  void find_ranks();
  void wait();
  bool are_all_gone() const;
  void watch_alone();
  bool look();
  void serve();
  bool has_news(const NodeReport& node);
  void send_heartbeat();
  void answer(const Ask& ask);
  void say_bye();
  bool was_suspended(const NodeReport& node);
  NodeReport report(size_t tail) const;
  void note_death(const Verdict& verdict, const NodeReport& node);
  void tell_death();
  void tell_last();
  void report_stragglers(const NodeReport& node);
  bool end_as_hung();
  void ask_for_stacks(const std::vector<int32_t>& culprits);
  void tell(const Verdict& verdict);
  void write_record(const Verdict& verdict, const NodeReport& node) const;
  const Watched* speaker() const;

  const std::string job_;
  const size_t num_ranks_;
  const std::string launch_folder_;
  SupervisorLink link_;
  const int64_t killed_before_ = out_of_memory_kills();
  std::vector<Watched> ranks_;
  bool has_told_death_ = false, is_served_ = false, has_ended_job_ = false;
  size_t num_gone_ = 0, num_gone_told_ = 0;
  int64_t waited_ns_ = 0;  // the longest wait when it was last looked at
  Clock::time_point heartbeat_sent_{}, report_sent_{};
  std::optional<std::pair<Verdict, NodeReport>> death_;  // seen, not told yet
  Clock::time_point born_ = Clock::now(), looked_ = born_, patient_until_{}, death_seen_{}, undecided_since_{},
                    stragglers_told_{}, over_since_{};
};

void Agent::find_ranks() {
  if (ranks_.size() >= num_ranks_) return;
  std::vector<std::string> paths = flight::find_rings(job_);
  for (const std::string& path : paths) {
    auto ring = RingReader::open(path);
    const auto is_known = [&](const Watched& rank) { return rank.ring->pid() == ring->pid(); };
    if (!ring || std::any_of(ranks_.begin(), ranks_.end(), is_known)) continue;
    UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, ring->pid(), 0)));
    ranks_.push_back({std::move(ring), std::move(process)});
  }
  if (ranks_.size() < num_ranks_) return;
  for (const std::string& path : paths) ::unlink(path.c_str());  // mapped: a name would only be left behind
}

// Until the next look, or a rank's end.
void Agent::wait() {
  std::vector<pollfd> ends;
  for (const Watched& rank : ranks_) {
    if (!rank.is_gone && rank.process) ends.push_back({rank.process.get(), POLLIN, 0});
  }
  ends.push_back(link_.polled());
  const bool is_quick = ranks_.size() < num_ranks_ && Clock::now() - born_ < std::chrono::seconds(2);
  ::poll(ends.data(), ends.size(), is_quick ? 20 : static_cast<int>(kTick.count()));
}

bool Agent::are_all_gone() const {
  return std::all_of(ranks_.begin(), ranks_.end(), [](const Watched& rank) { return rank.is_gone; });
}

NodeReport Agent::report(size_t tail) const {
  NodeReport node;
  for (const Watched& rank : ranks_) {
    node.host = rank.ring->host();
    node.ranks.push_back(rank.ring->read(tail));
  }
  return node;
}

int Agent::run() {
  while (!has_ended_job_) {
    find_ranks();
    for (Watched& rank : ranks_) {
      if (rank.is_gone || !rank.ring->is_gone()) continue;
      rank.is_gone = true;
      ++num_gone_;
    }
    link_.advance(Clock::now());
    const bool is_served = link_.is_up(Clock::now());
    if (ranks_.empty() ? Clock::now() - born_ > kRanksCome : are_all_gone()) {
      if (is_served) {
        say_bye();
      } else if (!link_.is_job_over()) {
        tell_last();
      }
      return 0;
    }
    if (is_served_ && !is_served) undecided_since_ = {};
    is_served_ = is_served;
    if (link_.is_job_over() && over_since_ == Clock::time_point()) over_since_ = Clock::now();
    if (link_.is_job_over() && Clock::now() - over_since_ < kJobEnds) {  // by mpirun: that is no death to tell of
      pause(kTick);
    } else if (is_served) {
      serve();
      wait();
    } else {
      watch_alone();
    }
  }
  return 0;
}

void Agent::watch_alone() {
  if (num_gone_ > num_gone_told_) {
    num_gone_told_ = num_gone_;
    return pause(kAfterADeath);  // where all end together there is nothing to tell
  }
  has_ended_job_ = look() && end_as_hung();
  if (!has_ended_job_) wait();
}

// The supervisor decides. It hears of this node each half second, and what it needs to know when it matters.
void Agent::serve() {
  const auto now = Clock::now();
  const bool has_died = num_gone_ > num_gone_told_;
  if (now - heartbeat_sent_ >= kHeartbeat || has_died) send_heartbeat();
  while (const auto ask = link_.next_ask()) answer(*ask);
  const NodeReport node = report(kTail);
  was_suspended(node);
  if (has_news(node) || has_died) {
    link_.send(Report{.number = 0, .node = node}, Clock::now());
    report_sent_ = Clock::now();
  }
  num_gone_told_ = num_gone_;
}

// A wait that has lasted for half of the timeout, and at once when it reaches the timeout. Others that are dead or
// stopped make somebody wait.
bool Agent::has_news(const NodeReport& node) {
  const int64_t timeout_ns = flight::rules_for(std::span(&node, 1)).timeout_ns;
  int64_t longest = 0;
  for (const RankReport& rank : node.ranks) {
    for (const flight::WaitReport& wait : rank.waits) longest = std::max(longest, wait.for_ns);
  }
  const bool has_crossed = waited_ns_ < timeout_ns && longest >= timeout_ns;
  waited_ns_ = longest;
  return has_crossed || (longest >= timeout_ns / 2 && Clock::now() - report_sent_ >= kReport);
}

void Agent::send_heartbeat() {
  const NodeReport node = report(0);
  Heartbeat heartbeat{.host = own_name()};
  for (const RankReport& rank : node.ranks) {
    heartbeat.ranks.push_back({rank.rank, rank.timed_steps, rank.compute_ns});
    heartbeat.step = std::max(heartbeat.step, rank.step);
  }
  std::sort(heartbeat.ranks.begin(), heartbeat.ranks.end(),
            [](const RankTime& a, const RankTime& b) { return a.rank < b.rank; });
  if (!node.ranks.empty()) heartbeat.timeout_ms = flight::rules_for(std::span(&node, 1)).timeout_ns / 1'000'000;
  heartbeat.out_of_memory_kills = std::max<int64_t>(out_of_memory_kills() - killed_before_, 0);
  heartbeat_sent_ = Clock::now();
  link_.send(heartbeat, heartbeat_sent_);
}

void Agent::answer(const Ask& ask) {
  if (!ask.stacks.empty()) ask_for_stacks(ask.stacks);
  link_.send(Report{.number = ask.number, .node = report(ask.tail)}, Clock::now());
}

void Agent::say_bye() {
  send_heartbeat();
  link_.send(Report{.number = 0, .node = report(kTail)}, Clock::now());
  link_.send(Bye{}, Clock::now());
  link_.flush(kLastWords);
}

// A whole job that was stopped (by a batch system, or its machine) has lost time, not ranks. Once it goes on, what ages
// it had before count for nothing until the timeout has passed again.
bool Agent::was_suspended(const NodeReport& node) {
  const auto timeout = std::chrono::nanoseconds(flight::rules_for(std::span(&node, 1)).timeout_ns);
  const auto is_stopped = [](const RankReport& rank) { return rank.liveness == Liveness::kStopped; };
  const bool are_all_stopped = node.ranks.size() > 1 && std::all_of(node.ranks.begin(), node.ranks.end(), is_stopped);
  const auto now = Clock::now();
  if (are_all_stopped || now - looked_ > std::max<Clock::duration>(timeout / 2, std::chrono::seconds(2)))
    patient_until_ = now + timeout;
  looked_ = now;
  return now < patient_until_;
}

// @return whether the job hangs.
bool Agent::look() {
  const NodeReport node = report(kTail);
  const std::span<const NodeReport> nodes(&node, 1);
  if (was_suspended(node)) return false;
  const Verdict verdict = flight::judge(nodes, flight::rules_for(nodes));
  if (verdict.cause == Cause::kNone) {
    undecided_since_ = {};
    report_stragglers(node);
    return false;
  }
  if (verdict.cause == Cause::kGone && verdict.waited_ns < flight::rules_for(nodes).timeout_ns) {
    note_death(verdict, node);
    return false;
  }
  if (verdict.cause == Cause::kAllArrived) {
    if (undecided_since_ == Clock::time_point()) undecided_since_ = Clock::now();
    return Clock::now() - undecided_since_ >= kOthersDecide;
  }
  return true;
}

// mpirun ends the job by itself, mostly, within a second; what it cannot say is what the others waited for. They may
// come to that only now.
void Agent::note_death(const Verdict& verdict, const NodeReport& node) {
  // One that ends by an error of its own says so itself, and mpirun ends the others.
  const bool has_spoken =
      std::any_of(node.ranks.begin(), node.ranks.end(), [](const RankReport& rank) { return rank.exit_kind == 1; });
  if (has_told_death_ || has_spoken) return;
  if (!death_) death_seen_ = Clock::now();
  if (!death_ || death_->first.culprits == verdict.culprits) death_ = {verdict, node};  // not once others end too
  if (!verdict.group.empty() || Clock::now() - death_seen_ > kOthersCome) tell_death();
}

void Agent::tell_death() {
  if (has_told_death_ || !death_) return;
  has_told_death_ = true;
  write_record(death_->first, death_->second);
  if (const Watched* rank = speaker()) rank->ring->give_notice(death_->first.message);
}

// The job ended before it was looked at again. Ranks that got other bytes than they asked for end by themselves,
// without knowing why.
void Agent::tell_last() {
  tell_death();
  const NodeReport node = report(flight::kNumEntries);
  const Verdict verdict = flight::judge(std::span(&node, 1), flight::rules_for(std::span(&node, 1)));
  if (!has_told_death_ && verdict.cause == Cause::kMismatch) write_record(verdict, node);
}

void Agent::report_stragglers(const NodeReport& node) {
  if (Clock::now() - stragglers_told_ < kStragglerPause || node.ranks.size() < num_ranks_) return;
  const auto stragglers = flight::find_stragglers(std::span(&node, 1));
  if (stragglers.empty()) return;
  if (const Watched* rank = speaker()) rank->ring->give_notice(flight::describe(stragglers));
  stragglers_told_ = Clock::now();
}

// The lowest rank that can still say something.
const Watched* Agent::speaker() const {
  const Watched* lowest = nullptr;
  for (const Watched& rank : ranks_) {
    const Liveness liveness = rank.ring->read(0).liveness;
    if (liveness == Liveness::kGone || liveness == Liveness::kStopped) continue;
    if (!lowest || rank.ring->header().rank < lowest->ring->header().rank) lowest = &rank;
  }
  return lowest;
}

void Agent::ask_for_stacks(const std::vector<int32_t>& culprits) {
  std::vector<std::pair<const RingReader*, uint32_t>> asked;
  for (const Watched& rank : ranks_) {
    const RankReport report = rank.ring->read(0);
    const bool is_culprit = std::count(culprits.begin(), culprits.end(), report.rank) > 0;
    if (!is_culprit || report.liveness == Liveness::kStopped || report.liveness == Liveness::kGone) continue;
    asked.emplace_back(rank.ring.get(), rank.ring->header().stack_number.load());
    ::kill(report.pid, SIGUSR2);
  }
  for (const auto give_up = Clock::now() + kStackTakes; Clock::now() < give_up; pause(milliseconds(10))) {
    if (std::all_of(asked.begin(), asked.end(),
                    [](const auto& rank) { return rank.first->header().stack_number.load() != rank.second; }))
      return;
  }
}

// @return false: it went on meanwhile.
bool Agent::end_as_hung() {
  const auto judge_now = [&](NodeReport& node) {
    node = report(flight::kNumEntries);
    return flight::judge(std::span(&node, 1), flight::rules_for(std::span(&node, 1)));
  };
  NodeReport node;
  Verdict first = judge_now(node);
  if (first.cause == Cause::kMismatch) {  // some may not have come to that call yet, and it is the many who are right
    pause(kOthersCall);
    first = judge_now(node);
  }
  if (first.cause == Cause::kNone) return false;
  ask_for_stacks(first.culprits);
  Verdict verdict = judge_now(node);
  if (verdict.cause != first.cause || verdict.culprits != first.culprits) verdict = first;
  write_record(verdict, node);
  tell(verdict);
  return true;
}

void Agent::tell(const Verdict& verdict) {
  const Watched* voice = speaker();
  for (const Watched& rank : ranks_) rank.ring->tell_to_end(&rank == voice ? verdict.message : "");
  if (voice == nullptr) {  // all are stopped: their standard error is still there
    for (const Watched& rank : ranks_) {
      const UniqueFd errors(
          ::open(("/proc/" + std::to_string(rank.ring->pid()) + "/fd/2").c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC));
      const std::string line = "lockstep agent: " + verdict.message + "\n";
      if (errors && ::write(errors.get(), line.data(), line.size()) > 0) break;
    }
  }
  // The living end with 76 first: what mpirun passes on is the code of the first that ends.
  pause(kRanksEnd);
  for (const Watched& rank : ranks_) {
    if (!rank.ring->is_gone()) ::kill(rank.ring->pid(), SIGKILL);
  }
}

// Into the run directory; before there is one, to where the launch keeps its records.
void Agent::write_record(const Verdict& verdict, const NodeReport& node) const {
  std::string folder;
  for (const Watched& rank : ranks_) {
    if (folder.empty()) folder = rank.ring->folder();
  }
  write_hang_record(folder.empty() ? launch_folder_ : folder, node.host, verdict, std::span(&node, 1));
}

const std::vector<Arguments::Flag> kFlags = {
    {"job", "KEY", "whose rings to watch"},
    {"ranks", "N", "how many ranks this node has"},
};

int agent(const Arguments& arguments) {
  ::close_range(3, ~0U, 0);       // mpirun's, which would wait for them
  if (::fork() != 0) ::_exit(0);  // whoever started this waits for nobody
  const std::string job = arguments.get("job", "");
  if (job.size() != 16 || job.find_first_not_of("0123456789abcdef") != std::string::npos)
    throw ConfigError("lockstep agent is started by a job's ranks");
  const char* launch = std::getenv("LOCKSTEP_LAUNCH_DIR");
  return Agent(job, static_cast<size_t>(arguments.number("ranks", 1, 1, 4096)), launch ? launch : "").run();
}

}  // namespace

const Verb kAgent = {"agent", "agent --job KEY --ranks N", "Watches this node's ranks; started by them.", &kFlags,
                     &agent};

}  // namespace lockstep::launcher
