#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include <lockstep/checkpoint/checkpoint.h>

namespace lockstep::checkpoint {

/// One box that has to be written, and the rank that writes it.
struct PlannedBox {
  size_t tensor = 0;  ///< index into the state
  Box box;
  int owner = 0;

  friend bool operator==(const PlannedBox&, const PlannedBox&) = default;
};

/// Who writes what: a pure function of the layouts, so every rank derives it alone. A box that one rank holds is its
/// own; replicas go, largest first, each to the least loaded of its holders, so they share the writing by bytes. Boxes
/// stay whole: a file can hold one box of a tensor only. In order of the state, then of the boxes.
/// Cost: n log n for n boxes. Source: longest processing time first, Graham, SIAM J. Appl. Math. 17(2), 1969.
std::vector<PlannedBox> plan_boxes(const std::vector<StateTensor>& state, int world_size);

/// Compares the ranks' plans, a digest a tensor. Collective. @throws CheckFailed on every rank, naming the first tensor
/// that a rank lays out otherwise than rank 0.
void check_same_plan(ProcessGroup& world, const std::vector<StateTensor>& state, const std::vector<PlannedBox>& plan);

/// "F32 [3, 4]", for messages.
std::string describe(const std::string& dtype, const std::vector<int64_t>& shape);

}  // namespace lockstep::checkpoint
