#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace lockstep::optim {

/// One local tensor to update: a whole parameter or a shard of one. All f32, contiguous; grad has param's numel.
struct LocalParameter {
  std::string name;      ///< fully qualified: optimizer state is keyed by it, never by index
  at::Tensor parameter;  ///< updated in place
  at::Tensor grad;       ///< read only; a view into a gradient bucket
  bool decay = true;     ///< weight decay applies (matrices and embeddings; not biases and norms)
};

/// What changes from step to step; computed once and equal to the bit on all ranks.
struct StepScalars {
  double learning_rate = 0;
  double grad_scale = 1;  ///< the clip coefficient, applied to grads inside the kernel
  int64_t step = 1;       ///< 1-based: bias correction
};

/// An elementwise optimizer on any list of local tensors: shards of a tensor get the bits the whole tensor gets,
/// because each element goes through the same written-out fma sequence wherever it stands in a slice.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  /// Binds the tensors and allocates zeroed state beside them.
  virtual void attach(std::vector<LocalParameter> parameters) = 0;
  /// Updates part `part` of `parts` of all elements: lanes of one rank share the work, each calling with its own part.
  /// The cut does not change bits.
  virtual void step(const StepScalars& scalars, int part = 0, int parts = 1) = 0;
  /// What it keeps for each parameter: "exp_avg", ...
  virtual std::vector<std::string> kinds() const = 0;
  /// State tensors as ("<parameter name>", "exp_avg", tensor) in attach order: what a checkpoint holds.
  struct StateTensor {
    std::string parameter;
    std::string kind;
    at::Tensor tensor;
  };
  virtual std::vector<StateTensor> state() = 0;
};

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
};
/// Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv:1711.05101.
std::unique_ptr<Optimizer> make_adamw(AdamWOptions options);

struct SgdOptions {
  double momentum = 0.9, weight_decay = 0.0;
  bool nesterov = false;
};
std::unique_ptr<Optimizer> make_sgd(SgdOptions options);

/// The factor for grads so that their norm is at most max_norm: min(1, max_norm / (norm + 1e-6)). max_norm <= 0: 1.
double clip_coefficient(double norm, double max_norm);

}  // namespace lockstep::optim
