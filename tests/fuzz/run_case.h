#pragma once

#include <chrono>
#include <string>

#include "case.h"

namespace lockstep::fuzz {

/// What became of a case. Shrinking keeps the kind.
struct Verdict {
  enum Kind { kSame, kDiffers, kThrew, kRefused, kDied, kHung };
  Kind kind = kSame;
  std::string text;
};

/// Runs a case as one process and as its layout says, on ranks that are threads, and compares all that is left.
///
/// To the bit: the layout with a run of the same tensor- and context-parallel size, and nothing else. Within
/// kBound: that run with one process, where rounding is all that differs (f32, SGD: Adam makes whole steps of rounding
/// errors). Interrupted runs are compared before and after.
/// @param work_dir a folder for the runs, which are removed.
/// @param timeout of each collective: a rank that waits longer waits in vain.
Verdict run_case(const Case& c, const std::string& work_dir, std::chrono::milliseconds timeout);

inline constexpr double kBound = 1e-4;

}  // namespace lockstep::fuzz
