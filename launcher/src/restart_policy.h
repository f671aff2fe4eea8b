#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <random>
#include <string>
#include <vector>

namespace lockstep::launcher {

/// Which way a start ended wrongly, where its exit code alone does not say it.
enum class Cause {
  kThrown,    ///< a rank said why, by an exception or by its own exit code
  kKilled,    ///< a process was ended from outside: the cause may be gone
  kCrashed,   ///< SIGSEGV, SIGABRT and the like
  kLostHost,  ///< a host, or the connection to it
};

/// What a start came to, as far as the next one is concerned.
struct Ending {
  int exit_code = 0;  ///< of DESIGN 4
  Cause cause = Cause::kThrown;
  bool was_asked = false;            ///< to stop, by whomever
  bool was_ready = false;            ///< all ranks were up
  std::string signature;             ///< what makes two failures the same; empty: a repetition says nothing
  std::optional<int64_t> step;       ///< at which it happened
  int64_t durable_step = -1;         ///< of the newest durable checkpoint after it; -1: none, or nobody knows
  bool can_do_without_host = false;  ///< exit code 79: the bad host is known, and others are enough
};

/// What has to be remembered from one start to the next, and from one supervisor to the next.
struct PolicyState {
  struct Failure {
    std::optional<int64_t> step;
    std::string signature;
    friend bool operator==(const Failure&, const Failure&) = default;
  };
  int64_t restarts_used = 0;            ///< since the durable step last advanced
  int64_t cycles_without_progress = 0;  ///< restarts whose ranks were up and which made nothing durable
  int64_t durable_step = -1;            ///< the furthest seen
  std::vector<Failure> seen;            ///< since it last advanced
};

struct Decision {
  bool goes_on = false;
  int exit_code = 0;                   ///< where it does not
  std::chrono::milliseconds delay{0};  ///< where it does
  std::string why;                     ///< for people; empty: nothing to add
};

/// Whether and when a job is started again. A pure function of what happened and of a seed: it has no clock and does
/// no input or output, so a simulator can drive it.
///
/// Flags, data and bugs (78, 65, 70) are never tried again, nor is a run that a newer start owns (73). A lost peer, a
/// killed rank, a crash, a hang, storage and a bad host are, after 1, 2, 4 ... 60 s, +-20 % so that many jobs do not
/// come back together; the first time after a plain kill or a lost host at once. `restarts` such tries may follow each
/// other; every time the durable step advances they start anew. The same crash or hang at the same step twice, or three
/// tries that trained and made nothing durable, end it before. Codes the project does not know are a program's own.
class RestartPolicy {
 public:
  static constexpr int kMostCyclesWithoutProgress = 3;

  RestartPolicy(int64_t restarts, uint64_t seed, PolicyState state = {})
      : restarts_(restarts), random_(seed), state_(std::move(state)) {}

  Decision after(const Ending& ending);
  const PolicyState& state() const { return state_; }

 private:
  std::chrono::milliseconds delay(const Ending& ending);

  int64_t restarts_;
  std::mt19937_64 random_;
  PolicyState state_;
};

}  // namespace lockstep::launcher
