#pragma once

#include <lockstep/sharding/context_parallel.h>
#include <lockstep/sharding/expert_parallel.h>
#include <lockstep/sharding/tensor_parallel.h>

namespace lockstep {

/// The groups over which a model's own layers are cut. Default: not at all.
struct ModelParallel {
  TensorParallel tensor;
  ContextParallel context;
  ExpertParallel expert;
  bool is_parallel() const { return tensor.is_parallel() || context.size() > 1 || expert.size() > 1; }
};

}  // namespace lockstep
