#pragma once

#include <string>
#include <vector>

namespace lockstep {

/// What --run_dir is where it is not given; the launcher looks there too.
inline constexpr const char* kDefaultRunDir = "run";

/// A heading of --help and the file whose flags stand under it.
struct FlagSection {
  const char* heading;
  const char* file;
};

/// Parses argv into gflags: `--name=value`, `--name value`, `--[no]bool`, `--flagfile=F` (depth <= 4, 100 files; a line
/// a flag, # comments). gflags' own parser would exit with 1 and pass over leftover words. --help prints `usage` and
/// the sections in order and exits 0.
/// @return the words that are no flags. @throws ConfigError unknown flag (with the nearest known one), bad value.
std::vector<std::string> parse_command_line(int argc, char** argv, const char* usage,
                                            const std::vector<FlagSection>& sections);

/// Every flag of `sections` as "--name=value" lines, for the record of a run.
std::string resolved_flags(const std::vector<FlagSection>& sections);

}  // namespace lockstep
