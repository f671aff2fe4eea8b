#pragma once

#include <string>

#include <lockstep/base/fs.h>

namespace lockstep::checkpoint {

/// Removes a folder without a manifest, saying so; a failure is logged and leaves it for the next start.
void remove_unfinished(Fs& fs, const std::string& directory);
/// Removes what a start that died was about to remove.
void remove_retired(Fs& fs, const std::string& checkpoints);

}  // namespace lockstep::checkpoint
