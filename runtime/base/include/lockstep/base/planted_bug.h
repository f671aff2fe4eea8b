#pragma once

#include <array>
#include <atomic>
#include <string>
#include <string_view>
#include <utility>

#include <lockstep/base/error.h>

namespace lockstep {

/// Bugs planted on purpose, so that the composition fuzzer (tests/fuzz) can show that it would find them. Each is one
/// that such programs have had. All are off unless a PlantedBug lives; asking costs a relaxed load.
enum class Plant : uint8_t {
  kNone,
  kDroppedContribution,  ///< ZeRO-2/3: the last rank's gradients of a round are left out of the sum
  kTiedCountedTwice,     ///< both copies of a tied weight are in the norm
  kLossScaleOfOneRank,   ///< the last rank divides its loss by another count
  kStaleParameters,      ///< ZeRO-1/2: the last bucket of updated parameters is not taken over from the other ranks
  kEarlyForward,         ///< ZeRO-1/2: forward does not wait for updated parameters
  kStaleUnit,            ///< ZeRO-3: what stays gathered in a step stays into the next
  kSwappedMicroBatches,  ///< pipeline: the last stage takes the targets of the neighbouring micro-batch
  kMissingTiedSum,       ///< pipeline: a tied weight's gradients do not meet
  kLeavesOutOfOrder,     ///< sums of uneven shares are added as if they were of one leaf each
  kOtherDropoutKey,      ///< recomputation draws other random numbers
  kShardOffByOneRow,     ///< ZeRO-1/2: the optimizer works on the rows one below
  kClipOfLocalNorm,      ///< each rank clips by the norm of what it has itself
  kLostOptimizerTensor,  ///< a resume leaves one of the optimizer's tensors out
  kAbsentFromExchange,   ///< ZeRO-2/3: a rank without micro-batch does not take part
  kPartialNotSummed,     ///< sequence parallel: replicated weights keep the gradient of their own tokens
  kExpertOfOtherLeaf,    ///< expert parallel: gradients of experts are taken for those of neighbouring micro-batches
  kReplicaCountedTwice,  ///< tensor parallel: every copy of a weight is in the norm
};

inline constexpr std::array<std::pair<std::string_view, Plant>, 17> kPlants = {{
    {"dropped_contribution", Plant::kDroppedContribution},
    {"tied_counted_twice", Plant::kTiedCountedTwice},
    {"loss_scale_of_one_rank", Plant::kLossScaleOfOneRank},
    {"stale_parameters", Plant::kStaleParameters},
    {"early_forward", Plant::kEarlyForward},
    {"stale_unit", Plant::kStaleUnit},
    {"swapped_micro_batches", Plant::kSwappedMicroBatches},
    {"missing_tied_sum", Plant::kMissingTiedSum},
    {"leaves_out_of_order", Plant::kLeavesOutOfOrder},
    {"other_dropout_key", Plant::kOtherDropoutKey},
    {"shard_off_by_one_row", Plant::kShardOffByOneRow},
    {"clip_of_local_norm", Plant::kClipOfLocalNorm},
    {"lost_optimizer_tensor", Plant::kLostOptimizerTensor},
    {"absent_from_exchange", Plant::kAbsentFromExchange},
    {"partial_not_summed", Plant::kPartialNotSummed},
    {"expert_of_other_leaf", Plant::kExpertOfOtherLeaf},
    {"replica_counted_twice", Plant::kReplicaCountedTwice},
}};

inline std::atomic<Plant> g_plant{Plant::kNone};

inline bool is_planted(Plant plant) { return g_plant.load(std::memory_order_relaxed) == plant; }

/// Plants a bug for the scope, in the whole process; the empty name plants none. @throws ConfigError an unknown name.
class PlantedBug {
 public:
  explicit PlantedBug(std::string_view name) {
    if (name.empty()) return;
    std::string known;
    for (const auto& [its_name, plant] : kPlants) {
      if (name == its_name) g_plant.store(plant);
      known += " " + std::string(its_name);
    }
    if (g_plant.load() != Plant::kNone) return;
    throw ConfigError("no bug named '" + std::string(name) + "' can be planted; there are:" + known);
  }
  ~PlantedBug() { g_plant.store(Plant::kNone); }
  PlantedBug(const PlantedBug&) = delete;
  PlantedBug& operator=(const PlantedBug&) = delete;
};

}  // namespace lockstep
