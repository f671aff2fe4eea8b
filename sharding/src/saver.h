#pragma once

#include <memory>

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include <lockstep/nn/dropout.h>
#include <lockstep/sharding/recompute.h>

namespace lockstep {

/// Decides what becomes of the tensors that autograd saves on this thread, while a SaverScope holds.
class Saver {
 public:
  virtual ~Saver() = default;
  virtual std::unique_ptr<torch::autograd::SavedVariableHooks> hooks() = 0;
};

class SaverScope {
 public:
  explicit SaverScope(Saver& saver);  ///< the first one replaces LibTorch's engine by one that asks savers
  ~SaverScope();
  SaverScope(const SaverScope&) = delete;
  SaverScope& operator=(const SaverScope&) = delete;

  static bool is_active();  ///< on this thread

 private:
  Saver* was_;
};

/// What a run's results depend on besides its tensors: this thread's state when made.
class Environment {
 public:
  Environment();
  void apply() const;

 private:
  struct Autocast {
    bool is_enabled;
    c10::ScalarType dtype;
  };
  nn::StepKey key_;
  bool has_grad_, has_weight_cache_, has_autocast_cache_;
  Autocast cpu_, cuda_;
  friend class SecondRun;
};

/// Runs `code` in an environment, with hooks around it and nobody listening to nn's functions; puts everything back,
/// whatever is thrown.
void run_again(const Environment& environment, const RecomputeHooks& hooks, const std::function<void()>& code);

/// A leaf that requires grad: kept itself, because its storage may be freed and filled again.
inline bool is_parameter(const at::Tensor& tensor) { return tensor.is_leaf() && tensor.requires_grad(); }

at::Tensor recompute_full(const std::function<at::Tensor()>& body, const RecomputeHooks& hooks);
at::Tensor recompute_selective(const std::function<at::Tensor()>& body, const RecomputeHooks& hooks);

}  // namespace lockstep
