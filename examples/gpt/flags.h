#pragma once

#include <string>

#include "model.h"

namespace gpt {

/// The flags of this program beside the shared ones (lockstep/train/flags.h).
struct Flags {
  Config model;
  std::string prompt;
  int64_t generate_tokens = 0;
  double temperature = 0.8;
  int64_t top_k = 50;
  uint64_t seed = 1;
};
Flags flags();

/// This file's neighbour flags.cc, for --help.
const char* flags_file();

}  // namespace gpt
