#pragma once

#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace lockstep::nn {

/// What a micro-batch's computation may depend on beside its data: the key of randomness, so that no layout changes it
/// and nothing has to be saved, and what the loss is weighted with.
struct StepKey {
  uint64_t seed = 0, step = 0, leaf = 0;
  float loss_weight = 1;  ///< the gradient that backward starts from; for losses that a layer adds where it stands
  uint64_t part = 0;      ///< of the forward: each has random numbers of its own for LibTorch's operators
};

/// Sets this thread's key for the scope. The Trainer does so around each micro-batch's forward.
///
/// Inside, LibTorch's random operators on CPU tensors (torch::nn::Dropout, torch::rand, ...) follow the key too: where
/// they are given no generator, they draw from one of this scope and the key's part instead of the process's default
/// one, which all threads share. An inner scope starts anew; after it this one's numbers go on.
/// Cost: nothing until something draws; then a generator of 2.5 KB, seeded (1 us) for each part that draws.
class StepScope {
 public:
  explicit StepScope(StepKey key);
  ~StepScope();
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

  struct Stream;

 private:
  StepKey was_;
  bool had_scope_;
  std::unique_ptr<Stream> stream_was_;
  c10::impl::IncludeDispatchKeyGuard draws_;
};

/// This thread's key.
StepKey step_key();
/// From here on another part of the forward runs on this thread. Units and the layers of a stack begin one each, so
/// that what they draw depends neither on how the model is cut nor on whether they run a second time.
void begin_part(uint64_t part);
/// What a generator of LibTorch's is seeded with for a key and its part.
uint64_t library_seed(const StepKey& key);

/// Zeroes elements with probability p and scales the rest by 1 / (1 - p); element i of layer `layer` has its own random
/// number. p = 0 or not training: x itself.
at::Tensor dropout(const at::Tensor& x, double p, bool training, uint64_t layer);

}  // namespace lockstep::nn
