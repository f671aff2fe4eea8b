#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <lockstep/data/dataset.h>

namespace lockstep::data {

/// Which micro-batches of a global batch this rank computes.
struct LoaderOptions {
  uint64_t seed = 0;
  int64_t micro_batch_size = 1;       ///< samples
  int64_t num_leaves = 1;             ///< micro-batches a global batch
  std::vector<int64_t> leaves = {0};  ///< this rank's, each below num_leaves
  int64_t first_step = 0;             ///< where to start: the whole state of a loader
  int64_t prefetch_steps = 2;         ///< batches prepared ahead by one background thread
  bool pin_memory = false;
};

/// Training batches: step k takes positions [k * G, (k+1) * G) of the global order (G = num_leaves * micro_batch_size),
/// leaf l of it the l-th micro-batch. Any number of ranks sees the same samples in the same leaves. Prefetched batches
/// are never state.
class TrainingLoader {
 public:
  TrainingLoader(std::shared_ptr<const Dataset> dataset, LoaderOptions options);
  ~TrainingLoader();  // waits for the step in preparation, never for another rank
  TrainingLoader(const TrainingLoader&) = delete;
  TrainingLoader& operator=(const TrainingLoader&) = delete;
  /// This rank's micro-batches of the next step, in the order of `leaves`. Rethrows what the prefetch thread met
  /// (naming file and position).
  std::vector<Batch> next();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// One finite, exact pass in file order: each sample once over all ranks; the last micro-batch is padded by repeating
/// its last sample and says so in valid_samples. Returns the micro-batches `begin .. end` of ceil(size /
/// micro_batch_size).
class EvaluationPass {
 public:
  EvaluationPass(std::shared_ptr<const Dataset> dataset, int64_t micro_batch_size, int64_t max_samples = -1);
  int64_t num_micro_batches() const;
  Batch get(int64_t index) const;

 private:
  std::shared_ptr<const Dataset> dataset_;
  int64_t micro_batch_size_, samples_;
};

}  // namespace lockstep::data
