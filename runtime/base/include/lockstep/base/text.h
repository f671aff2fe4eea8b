#pragma once

#include <string>
#include <vector>

namespace lockstep {

/// ". Mend: did you mean --steps?" for the candidate nearest to a mistyped word, or ". Mend: see --help" when none is
/// near.
std::string did_you_mean(const std::string& word, const std::vector<std::string>& candidates,
                         const std::string& prefix = "");

}  // namespace lockstep
