#pragma once

#include <string>
#include <vector>

#include <lockstep/checkpoint/checkpoint.h>

namespace lockstep::checkpoint {

/// How a test lays its tensors out over the ranks.
enum class Cut {
  kReplicated,      ///< every rank holds everything
  kRows,            ///< along dim 0, uneven, some ranks empty where there are more ranks than rows
  kColumns,         ///< along the last dim
  kReplicatedRows,  ///< ranks r and r + world/2 hold the same rows (odd worlds: as kRows)
};
inline constexpr Cut kAllCuts[] = {Cut::kReplicated, Cut::kRows, Cut::kColumns, Cut::kReplicatedRows};

/// A small model with every kind of tensor: matrices, a vector, a scalar, one without elements, several dtypes,
/// weights, buffers and optimizer state. Element i of the global tensor is a function of (name, i, salt), or 0 when not
/// filled.
std::vector<StateTensor> make_state(Cut cut, int world_size, int rank, int salt, bool filled = true);

/// Names the first element that differs from what make_state(…, salt) fills in; empty when none does.
std::string first_difference(const std::vector<StateTensor>& state, int rank, int salt);

Progress progress_at(int64_t step);

}  // namespace lockstep::checkpoint
