// T19: supervisors, membership and fencing on a virtual clock, with hosts that crash and fall silent, operations on
// storage that arrive late or after their process is gone, supervisors that are killed, and second jobs on the same
// run. What decides is the real restart policy and the real placement; the epoch protocol is modelled after
// checkpoint/format/fencing and Store::commit: look for a newer epoch, rename the manifest, look again, only then call
// it durable.
//
// Every seed is one history: simulate(seed) replays it. Invariants: an acknowledged step is never lost (P1), no older
// start acknowledges anything after a newer one has loaded (P6), no more restarts follow each other without progress
// than the budget has, and a job whose faults end comes to its end. Mutants show that each of them can be broken.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <queue>
#include <random>
#include <set>
#include <string>
#include <tuple>

#include <gtest/gtest.h>

#include "../../launcher/src/hosts.h"
#include "../../launcher/src/restart_policy.h"

namespace lockstep::launcher {
namespace {

constexpr int64_t kSteps = 60, kSaveEvery = 5, kRestarts = 3, kRanks = 8, kMinRanks = 2;
constexpr double kStepS = 1, kFaultsEndS = 150, kHorizonS = 20'000;

enum class Mutant {
  kNone,
  kNoSecondLook,      // after the manifest is there
  kNoLooks,           // at newer epochs at all
  kEarlyAck,          // durable before the manifest is there
  kLoadsOlder,        // a start takes the oldest checkpoint of the newest epoch
  kForgetsTheBudget,  // the policy is asked with more restarts than there are
  kNeverRestarts,
  kGivesUpARace,    // for an epoch, against an earlier start of the same job
  kLateStartsWin,   // and race again
  kKeepsLostHosts,  // ranks are placed on hosts that do not answer
};

struct Machine {
  bool is_up = true;
  double cut_until = 0;
};

// One start of the program: its rank 0, which is all that touches storage.
struct Start {
  int job = 0, host = 0;
  int64_t number = 0;  // of the job's starts
  uint64_t epoch = 0;
  int64_t step = 0;
  bool is_running = true;   // as its supervisor sees it
  bool chief_lives = true;  // rank 0, which may outlive that on a silent host
  std::vector<int> hosts;
};

class Simulation {
 public:
  Simulation(uint64_t seed, Mutant mutant, bool is_told = false)
      : random_(seed), mutant_(mutant), is_told_(is_told), machines_(4) {}

  /// @return what was violated; empty: nothing.
  std::string run() {
    if (chance(0.15)) poison_ = uniform(1, kSteps);
    late_ = chance(0.2) ? 0.4 : 0.05;
    const bool is_storm = chance(0.1);  // more than a budget is for
    const int64_t faults = is_storm ? uniform(10, 40) : uniform(0, 4);
    const double end = is_storm ? real(20, kFaultsEndS) : chance(0.3) ? 10 : kFaultsEndS;  // while it starts, and later
    is_recoverable_ = faults <= kRestarts && poison_ < 0;
    for (int64_t i = 0; i < faults; ++i) at(real(0, end), [this] { fault(); });
    begin_job(0);
    if (chance(0.25)) at(real(0, kFaultsEndS), [this] { begin_job(1); });
    while (!events_.empty() && violated_.empty() && now_ < kHorizonS) {
      const Event event = events_.top();
      events_.pop();
      now_ = event.at;
      event.happen();
    }
    if (violated_.empty() && is_recoverable_ && !is_done_) violated_ = "the job did not come to its end: " + told_;
    return violated_;
  }

 private:
  struct Event {
    double at;
    uint64_t number;  // of equal times the earlier one first
    std::function<void()> happen;
    bool operator<(const Event& other) const { return std::tie(at, number) > std::tie(other.at, other.number); }
  };
  struct Job {
    std::unique_ptr<RestartPolicy> policy;
    PolicyState saved;
    std::shared_ptr<Start> start;
    int supervisor = 0;    // number of the one that lives
    int64_t launches = 0;  // kept with the policy's state
    bool is_over = false;
    int64_t restarts_in_a_row = 0, durable_at_restart = -1;
  };
  using StartPtr = std::shared_ptr<Start>;

  double real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_); }
  int64_t uniform(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_); }
  bool chance(double probability) { return real(0, 1) < probability; }
  void at(double time, std::function<void()> happen) { events_.push({time, ++events_made_, std::move(happen)}); }
  void in(double delay, std::function<void()> happen) { at(now_ + delay, std::move(happen)); }
  void tell(const Start& start, const std::string& what) const {
    if (is_told_)
      std::cout << now_ << " s, job " << start.job << " epoch " << start.epoch << " step " << start.step << ": " << what
                << std::endl;
  }
  bool is_silent(int host) const { return machines_[host].cut_until > now_; }
  bool answers(int host) const { return machines_[host].is_up && !is_silent(host); }

  // An operation of rank 0 on storage: late by milliseconds or by half a minute, later still on a silent host. One
  // whose process died meanwhile arrives or does not; `then`, what the process does with the answer, happens only when
  // it lives.
  void storage(const StartPtr& start, std::function<void()> effect, std::function<void()> then) {
    double delay = chance(late_) ? real(0, 30) : real(0.001, 0.02);
    delay = std::max(delay, machines_[start->host].cut_until - now_ + real(0, 0.1));
    in(delay, [this, start, effect = std::move(effect), then = std::move(then)] {
      if (!start->chief_lives && chance(0.5)) return;
      effect();
      const double back = real(0, 0.005);
      in(back, [start, then] {
        if (start->chief_lives) then();
      });
    });
  }

  int64_t newest_durable() const { return checkpoints_.empty() ? -1 : checkpoints_.rbegin()->second; }

  void begin_job(int number) {
    Job& job = jobs_[number];
    if (is_done_ && number > 0) return;
    job.saved.durable_step = newest_durable();
    begin_supervisor(number);
  }

  int64_t budget() const {
    return mutant_ == Mutant::kForgetsTheBudget ? 1000 : mutant_ == Mutant::kNeverRestarts ? 0 : kRestarts;
  }

  void begin_supervisor(int number) {
    Job& job = jobs_[number];
    job.policy = std::make_unique<RestartPolicy>(budget(), random_(), job.saved);
    ++job.supervisor;
    launch(number);
  }

  void launch(int number) {
    Job& job = jobs_[number];
    if (job.is_over) return;
    std::vector<Host> hosts;
    for (int host = 0; host < static_cast<int>(machines_.size()); ++host) {
      if (answers(host) || mutant_ == Mutant::kKeepsLostHosts) hosts.push_back({std::to_string(host), 2});
    }
    const auto placement = place(hosts, kRanks, kMinRanks, {});
    if (!placement) return ended(number, {.exit_code = 75, .cause = Cause::kLostHost});
    auto start = job.start = std::make_shared<Start>();
    start->job = number;
    start->number = ++job.launches;
    for (const Host& host : placement->hosts) start->hosts.push_back(std::stoi(host.name));
    start->host = start->hosts[0];
    for (const int host : start->hosts) {
      if (!machines_[host].is_up)  // mpirun cannot reach it
        return stop(start, {.exit_code = 75, .cause = Cause::kLostHost}, 2);
      if (is_silent(host)) watch_silence(start, host);
    }
    in(real(0.5, 2), [this, start] { take_epoch(start); });
  }

  // Another job's start that still lives keeps us out; one of our own job is over, wherever it was.
  void take_epoch(const StartPtr& start) {
    if (!start->chief_lives) return;
    const StartPtr owner = owner_;
    const bool owner_lives = owner && owner->job != start->job && owner->chief_lives && !is_silent(owner->host);
    const bool is_late =
        mutant_ != Mutant::kLateStartsWin && owner && owner->job == start->job && owner->number > start->number;
    if (owner_lives || is_late) return stop(start, {.exit_code = 73}, 0.1);
    const uint64_t epoch = newest_epoch_ + 1;
    storage(
        start,
        [this, start, epoch] {
          if (newest_epoch_ >= epoch) return;  // O_EXCL: somebody else won it
          newest_epoch_ = epoch;
          start->epoch = epoch;
          owner_ = start;
        },
        [this, start] {
          if (start->epoch > 0) return load(start);
          // An earlier start of our own job may have been cut off with this very operation under way.
          const bool is_ours = owner_->job == start->job && mutant_ != Mutant::kGivesUpARace &&
                               (owner_->number < start->number || mutant_ == Mutant::kLateStartsWin);
          is_ours ? take_epoch(start) : stop(start, {.exit_code = 73}, 0.1);
        });
  }

  void load(const StartPtr& start) {
    storage(
        start,
        [this, start] {
          int64_t step = std::max<int64_t>(newest_durable(), 0);
          if (mutant_ == Mutant::kLoadsOlder && !checkpoints_.empty()) step = checkpoints_.begin()->second;
          if (step < acknowledged_)
            violated_ = "epoch " + std::to_string(start->epoch) + " goes on from step " + std::to_string(step) +
                        ", though " + std::to_string(acknowledged_) + " was durable (P1)";
          start->step = step;
          loaded_ = std::max(loaded_, start->epoch);
          tell(*start, "loaded");
        },
        [this, start] { start->step >= kSteps ? stop(start, {.exit_code = 0}, 0.2) : train(start); });
  }

  void train(const StartPtr& start) {
    in(kStepS, [this, start] {
      if (!start->chief_lives) return;
      for (const int host : start->hosts) {  // a collective waits for all
        if (!answers(host)) return in(0.5, [this, start] { train(start); });
      }
      if (!start->is_running) return;  // its peers are gone
      if (start->step + 1 == poison_)
        return stop(start, {.exit_code = 70, .cause = Cause::kCrashed, .signature = "signal 6", .step = poison_}, 1);
      ++start->step;
      if (start->step % kSaveEvery == 0 || start->step == kSteps) return save(start);
      train(start);
    });
  }

  void look_then(const StartPtr& start, bool is_skipped, std::function<void()> then) {
    if (is_skipped) return then();
    auto newest = std::make_shared<uint64_t>(0);
    storage(
        start, [this, newest] { *newest = newest_epoch_; },
        [this, start, newest, then = std::move(then)] {
          if (*newest > start->epoch) return stop(start, {.exit_code = 73}, 0.1);
          then();
        });
  }

  void save(const StartPtr& start) {
    const int64_t step = start->step;
    if (chance(0.03) && step < kSteps) return train(start);  // storage failed: that save alone is lost
    look_then(start, mutant_ == Mutant::kNoLooks, [this, start, step] {
      if (mutant_ == Mutant::kEarlyAck) acknowledge(*start, step);
      storage(
          start,
          [this, start, step] {
            checkpoints_.insert({start->epoch, step});
          },
          [this, start, step] {
            look_then(start, mutant_ == Mutant::kNoLooks || mutant_ == Mutant::kNoSecondLook, [this, start, step] {
              acknowledge(*start, step);
              if (step == kSteps) return stop(start, {.exit_code = 0}, 0.2);
              train(start);
            });
          });
    });
  }

  void acknowledge(const Start& start, int64_t step) {
    if (start.epoch < loaded_)
      violated_ = "epoch " + std::to_string(start.epoch) + " calls step " + std::to_string(step) +
                  " durable after epoch " + std::to_string(loaded_) + " has loaded (P6)";
    acknowledged_ = std::max(acknowledged_, step);
    tell(start, "durable");
  }

  // The start ends by itself or is ended; its supervisor hears of it `later`. Rank 0 of a silent host cannot be told.
  void stop(const StartPtr& start, Ending ending, double later) {
    if (!start->is_running) {
      start->chief_lives = false;  // fenced, with nobody left to hear of it
      return;
    }
    start->is_running = false;
    tell(*start, "ends with " + std::to_string(ending.exit_code));
    if (is_silent(start->host) && ending.cause != Cause::kThrown && machines_[start->host].is_up) {
      in(real(0, 20), [start] { start->chief_lives = false; });
    } else {
      start->chief_lives = false;
    }
    ending.was_ready = start->epoch > 0;
    const int supervisor = jobs_[start->job].supervisor;
    in(later, [this, start, ending, supervisor] {
      if (jobs_[start->job].supervisor == supervisor && jobs_[start->job].start == start) ended(start->job, ending);
    });
  }

  void ended(int number, Ending ending) {
    Job& job = jobs_[number];
    ending.durable_step = newest_durable();
    const Decision decision = job.policy->after(ending);
    told_ = "code " + std::to_string(ending.exit_code) + " at " + std::to_string(now_) + " s; " + decision.why;
    job.saved = job.policy->state();
    if (!decision.goes_on) {
      job.is_over = true;
      is_done_ |= decision.exit_code == 0;
      return;
    }
    job.restarts_in_a_row = ending.durable_step > job.durable_at_restart ? 1 : job.restarts_in_a_row + 1;
    job.durable_at_restart = std::max(job.durable_at_restart, ending.durable_step);
    if (job.restarts_in_a_row > kRestarts)
      violated_ = std::to_string(job.restarts_in_a_row) + " restarts follow each other without progress";
    const int supervisor = job.supervisor;
    in(static_cast<double>(decision.delay.count()) / 1000, [this, number, supervisor] {
      if (jobs_[number].supervisor == supervisor) launch(number);
    });
  }

  void watch_silence(const StartPtr& start, int host) {
    in(6, [this, start, host] {  // keepalive
      if (start->is_running && is_silent(host)) stop(start, {.exit_code = 75, .cause = Cause::kLostHost}, 0);
    });
  }

  bool uses(const StartPtr& start, int host) const {
    return start && std::find(start->hosts.begin(), start->hosts.end(), host) != start->hosts.end();
  }

  void crash(int host) {
    machines_[host].is_up = false;
    if (chance(0.5)) in(real(5, 100), [this, host] { machines_[host].is_up = true; });
    for (Job& job : jobs_) {
      if (!uses(job.start, host)) continue;
      if (job.start->host == host) job.start->chief_lives = false;
      if (job.start->is_running) stop(job.start, {.exit_code = 75, .cause = Cause::kLostHost}, real(0.1, 2));
    }
  }

  // Its ranks die soon; somebody starts it again, perhaps elsewhere and before that.
  void kill_supervisor() {
    Job& job = jobs_[0];
    if (job.is_over) return;
    const int number = ++job.supervisor;
    if (const StartPtr start = job.start) {
      start->is_running = false;
      in(real(0, 5), [start] { start->chief_lives = false; });
    }
    in(real(0.1, 8), [this, number] {
      if (jobs_[0].supervisor == number) begin_supervisor(0);
    });
  }

  void fault() {
    const StartPtr start = jobs_[0].start;
    if (start) tell(*start, "a fault comes");
    const int host = static_cast<int>(uniform(0, static_cast<int64_t>(machines_.size()) - 1));
    const auto count = [this](auto what) { return std::count_if(machines_.begin(), machines_.end(), what); };
    switch (uniform(0, 3)) {
      case 0:  // a rank is killed
        if (start && start->is_running) stop(start, {.exit_code = 75, .cause = Cause::kKilled}, real(0.1, 1.5));
        break;
      case 1:  // a host crashes, and comes back or not; some are always left
        if (count([](const Machine& one) { return one.is_up; }) >= 3) crash(host);
        break;
      case 2:  // a host falls silent for a while
        if (count([this](const Machine& one) { return !one.is_up || one.cut_until > now_; }) > 0) break;
        machines_[host].cut_until = now_ + real(1, 60);
        for (const Job& job : jobs_) {
          if (uses(job.start, host)) watch_silence(job.start, host);
        }
        break;
      default:
        kill_supervisor();
    }
  }

  std::mt19937_64 random_;
  const Mutant mutant_;
  const bool is_told_;
  std::priority_queue<Event> events_;
  uint64_t events_made_ = 0;
  double now_ = 0;
  std::vector<Machine> machines_;
  Job jobs_[2];
  double late_ = 0;      // how many operations on storage are
  int64_t poison_ = -1;  // the program crashes at this step, every time
  bool is_recoverable_ = true, is_done_ = false;
  std::string violated_, told_;

  // Storage: what everybody sees.
  uint64_t newest_epoch_ = 0;
  StartPtr owner_;                                      // of the newest epoch
  std::set<std::pair<uint64_t, int64_t>> checkpoints_;  // (epoch, step), with a manifest
  int64_t acknowledged_ = 0;                            // the furthest step reported as durable
  uint64_t loaded_ = 0;                                 // the newest epoch that has read the checkpoints
};

uint64_t first_violation(uint64_t seeds, Mutant mutant, std::string& what) {
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    what = Simulation(seed, mutant).run();
    if (!what.empty()) return seed;
  }
  return seeds;
}

TEST(Simulator, NoHistoryBreaksAPromise) {
  const uint64_t seeds = std::getenv("LOCKSTEP_DEEP") ? 10'000'000 : 10'000;
  std::string what;
  const uint64_t seed = first_violation(seeds, Mutant::kNone, what);
  EXPECT_EQ(seed, seeds) << "seed " << seed << ": " << what;
}

TEST(Simulator, ASeedIsTold) {  // LOCKSTEP_SEED=N: what happened in it
  const char* seed = std::getenv("LOCKSTEP_SEED");
  if (!seed) return;
  EXPECT_EQ(Simulation(std::strtoull(seed, nullptr, 10), Mutant::kNone, true).run(), "");
}

TEST(Simulator, ASeedReplays) {
  for (uint64_t seed = 0; seed < 300; ++seed)
    EXPECT_EQ(Simulation(seed, Mutant::kNoLooks).run(), Simulation(seed, Mutant::kNoLooks).run()) << seed;
}

class MutantTest : public testing::TestWithParam<Mutant> {};

TEST_P(MutantTest, IsFound) {
  constexpr uint64_t kSeeds = 100'000;
  std::string what;
  const uint64_t seed = first_violation(kSeeds, GetParam(), what);
  EXPECT_LT(seed, kSeeds);
  std::cout << "found by seed " << seed << ": " << what << std::endl;
}

INSTANTIATE_TEST_SUITE_P(All, MutantTest,
                         testing::Values(Mutant::kNoSecondLook, Mutant::kNoLooks, Mutant::kEarlyAck,
                                         Mutant::kLoadsOlder, Mutant::kForgetsTheBudget, Mutant::kNeverRestarts,
                                         Mutant::kGivesUpARace, Mutant::kLateStartsWin, Mutant::kKeepsLostHosts),
                         [](const auto& instance) { return std::to_string(static_cast<int>(instance.param)); });

}  // namespace
}  // namespace lockstep::launcher
