#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>

#include "case.h"
#include "run_case.h"

namespace lockstep::fuzz {

/// Cases on processes of their own, so that a crash or a hang costs one case and not the search.
struct WorkerOptions {
  int jobs = 1;
  std::string work_dir;                       ///< a folder each is made inside
  std::chrono::milliseconds timeout{30'000};  ///< of a collective; a case as a whole has four times as long
  bool shows_log = false;                     ///< what runs say on stderr
};

/// Runs cases until `next` has none and all have come back, or `done` says stop (false).
/// @param next, done called on this thread. A case that `done` stops at is the last one told.
void run_on_workers(const WorkerOptions& options, const std::function<std::optional<Case>()>& next,
                    const std::function<bool(const Case&, const Verdict&)>& done);

/// One case.
Verdict run_on_worker(const WorkerOptions& options, const Case& c);

/// The program that a worker is: reads cases from stdin, a line each, and answers a line each. @return exit code.
int be_worker(const std::string& work_dir, std::chrono::milliseconds timeout);

}  // namespace lockstep::fuzz
