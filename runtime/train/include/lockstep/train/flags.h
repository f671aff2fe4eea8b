#pragma once

#include <lockstep/train/options.h>

namespace lockstep::train {

/// Parses argv into gflags, for every training program: `--name=value`, `--name value`, `--[no]bool`, `--flagfile=F`
/// (depth <= 4).
/// --help prints the program's own flags first and exits 0.
/// @param usage one line: what the program trains.
/// @param own_file the program's flags.cc (pass __FILE__), whose flags --help shows first.
/// @throws ConfigError unknown flag (with the nearest known one), bad value, leftover word.
void parse_flags(int argc, char** argv, const char* usage, const char* own_file);

/// The shared flags as Options: the one bridge between gflags and the library.
Options options_from_flags();

/// The shared flags as "--name=value" lines, for run.json.
std::string shared_flags();

/// The data flags, for tasks.
std::string train_data_flag();
std::string validation_data_flag();

}  // namespace lockstep::train
