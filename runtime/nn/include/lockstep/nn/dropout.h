#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace lockstep::nn {

/// What a micro-batch's computation may depend on beside its data: the key of randomness, so that no layout changes it
/// and nothing has to be saved, and what the loss is weighted with.
struct StepKey {
  uint64_t seed = 0, step = 0, leaf = 0;
  float loss_weight = 1;  ///< the gradient that backward starts from; for losses that a layer adds where it stands
};

/// Sets this thread's key for the scope. The Trainer does so around each micro-batch.
class StepScope {
 public:
  explicit StepScope(StepKey key);
  ~StepScope();
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

 private:
  StepKey was_;
};

/// This thread's key.
StepKey step_key();

/// Zeroes elements with probability p and scales the rest by 1 / (1 - p); element i of layer `layer` has its own random
/// number. p = 0 or not training: x itself.
at::Tensor dropout(const at::Tensor& x, double p, bool training, uint64_t layer);

}  // namespace lockstep::nn
