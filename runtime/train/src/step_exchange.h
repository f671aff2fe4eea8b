#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include <lockstep/base/exact_sum.h>
#include <lockstep/collectives/process_group.h>

namespace lockstep::train {

/// What ranks tell each other once a step, in one message: everything a step needs to agree on.
struct StepReport {
  ExactSum squares;   ///< of this rank's pieces of the gradient
  ExactSum loss;      ///< sums of its micro-batches' losses
  ExactSum correct;   ///< right answers, where the task counts them
  int64_t count = 0;  ///< what the micro-batches of its *next* step count for: known before their forward
  int32_t has_correct = 0;
  int32_t stop = 0;     ///< a signal asked for the end
  int32_t writing = 0;  ///< its storage is at work for a checkpoint
  int32_t save = 0;     ///< it is time for a checkpoint
  double busy = 0;      ///< part of its last 20 steps that this rank waited for nobody; 0: not known. Not merged

  void merge(const StepReport& other) {
    squares.merge(other.squares);
    loss.merge(other.loss);
    correct.merge(other.correct);
    count += other.count;
    has_correct |= other.has_correct;
    stop |= other.stop;
    writing |= other.writing;
    save |= other.save;
  }
};

/// All ranks' reports merged: equal to the bit on every rank and for any number of ranks.
/// @param digests  travel in the same message: in this rank's, as many on every rank; out everybody's, in rank order.
/// @param busy     out: everybody's StepReport::busy, in rank order.
StepReport exchange(ProcessGroup& group, const StepReport& mine, std::vector<uint64_t>* digests = nullptr,
                    std::vector<double>* busy = nullptr);

/// The rank that computes longest, against the median one. Shares of a step's time will do: steps take all ranks alike.
struct SlowestRank {
  int rank = 0;
  double ratio = 1;
};
/// @return nullopt where one is not known, or there are no two.
std::optional<SlowestRank> slowest_rank(std::span<const double> busy);

}  // namespace lockstep::train
