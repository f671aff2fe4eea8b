#pragma once

#include <string>
#include <vector>

namespace lockstep::data {

/// The files a path or glob means, sorted. @throws ConfigError none, a folder, or one that cannot be read, with the
/// mend.
std::vector<std::string> expand_files(const std::string& pattern);

}  // namespace lockstep::data
