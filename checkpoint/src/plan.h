#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <lockstep/checkpoint/checkpoint.h>

namespace lockstep::checkpoint {

/// One box that has to be written, and the rank that writes it.
struct PlannedBox {
  size_t tensor = 0;  ///< index into the state
  Box box;
  int owner = 0;
};

/// Who writes what: a pure function of the layouts, so every rank derives it alone. Each distinct box goes to the least
/// loaded of the ranks that hold it, in state order, so replicas share the writing.
std::vector<PlannedBox> plan_boxes(const std::vector<StateTensor>& state, int world_size);

/// Removes an unfinished or retired checkpoint folder, file by file.
void remove_leftover(Fs& fs, const std::string& directory);

/// "F32 [3, 4]", for messages.
std::string describe(const std::string& dtype, const std::vector<int64_t>& shape);

}  // namespace lockstep::checkpoint
