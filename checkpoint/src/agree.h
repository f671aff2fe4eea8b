#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include <lockstep/collectives/process_group.h>

namespace lockstep::checkpoint {

/// How a step of the protocol went; the worst of all ranks counts for all of them.
enum class Outcome : int64_t {
  kDone = 0,
  kFailed = 1,   ///< storage said no
  kBusy = 2,     ///< storage said "not now": the same call may succeed in a minute
  kCorrupt = 3,  ///< the bytes are there and wrong, or gone
  kFenced = 4,   ///< a newer start owns the run
};

struct Verdict {
  Outcome outcome = Outcome::kDone;
  std::string reason;  ///< of the lowest rank with that outcome: what it was doing to which file, and errno
};

/// Runs `work` on this rank; what goes wrong with storage is logged and becomes the verdict. Other exceptions (bugs,
/// configuration) pass.
Verdict try_here(const std::string& doing, const std::function<void()>& work);

/// The same, and agrees with the other ranks on the worst verdict. Collective.
Verdict attempt(ProcessGroup& world, const std::string& doing, Milliseconds timeout, const std::function<void()>& work);

/// Runs `work` on rank 0 and hands its text to every rank; when it throws an Error, every rank throws one of the same
/// exit code and message, so that none waits for a rank that has left. Collective.
std::string on_chief(ProcessGroup& world, Milliseconds timeout, const std::function<std::string()>& work);

}  // namespace lockstep::checkpoint
