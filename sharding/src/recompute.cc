#include <mutex>
#include <optional>

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/engine.h>

#include <lockstep/base/planted_bug.h>
#include <lockstep/nn/precision.h>
#include <lockstep/nn/remake.h>
#include <lockstep/sharding/recompute.h>

#include "saver.h"

namespace lockstep {
namespace {

thread_local Saver* t_saver = nullptr;

// LibTorch offers hooks on saved tensors to Python only; the engine is asked for them whatever the language.
class SavingEngine : public torch::autograd::Engine {
 public:
  std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override {
    return t_saver ? t_saver->hooks() : nullptr;
  }
  static torch::autograd::Engine& instance() {
    static auto* const engine = new SavingEngine;  // never destroyed: threads may be in backward when statics go
    return *engine;
  }
};

}  // namespace

SaverScope::SaverScope(Saver& saver) : was_(t_saver) {
  static std::once_flag once;
  std::call_once(once, [] { torch::autograd::set_default_engine_stub(&SavingEngine::instance); });
  t_saver = &saver;
}
SaverScope::~SaverScope() { t_saver = was_; }
bool SaverScope::is_active() { return t_saver != nullptr; }

Environment::Environment()
    : key_(nn::step_key()),
      has_grad_(at::GradMode::is_enabled()),
      has_weight_cache_(nn::WeightCacheScope::is_on()),
      has_autocast_cache_(at::autocast::is_autocast_cache_enabled()),
      cpu_{at::autocast::is_autocast_enabled(at::kCPU), at::autocast::get_autocast_dtype(at::kCPU)},
      cuda_{at::autocast::is_autocast_enabled(at::kCUDA), at::autocast::get_autocast_dtype(at::kCUDA)} {}

void Environment::apply() const {
  for (const auto& [device, autocast] : {std::pair(at::kCPU, cpu_), std::pair(at::kCUDA, cuda_)}) {
    at::autocast::set_autocast_enabled(device, autocast.is_enabled);
    at::autocast::set_autocast_dtype(device, autocast.dtype);
  }
  at::autocast::set_autocast_cache_enabled(has_autocast_cache_);
  at::GradMode::set_enabled(has_grad_);
}

// The environment for a scope. What has a scope of its own in nn goes by that.
class SecondRun {
 public:
  explicit SecondRun(const Environment& environment)
      : key_(key_of(environment)), weight_cache_(environment.has_weight_cache_), remake_(nullptr) {
    environment.apply();
  }
  ~SecondRun() { before_.apply(); }
  SecondRun(const SecondRun&) = delete;
  SecondRun& operator=(const SecondRun&) = delete;

 private:
  static nn::StepKey key_of(const Environment& environment) {
    nn::StepKey key = environment.key_;
    if (is_planted(Plant::kOtherDropoutKey)) ++key.leaf;
    return key;
  }

  Environment before_;  // first: read before anything changes
  nn::StepScope key_;
  nn::WeightCacheScope weight_cache_;
  nn::RemakeScope remake_;
};

void run_again(const Environment& environment, const RecomputeHooks& hooks, const std::function<void()>& code) {
  if (hooks.before_rerun) hooks.before_rerun();
  try {
    const SecondRun scope(environment);
    code();
  } catch (...) {
    if (hooks.after_rerun) hooks.after_rerun();
    throw;
  }
  if (hooks.after_rerun) hooks.after_rerun();
}

namespace {

// What a layer draws from LibTorch has a stream of its own, however it is run; what comes after it too.
class PartScope {
 public:
  PartScope() { begin(); }
  ~PartScope() { begin(); }
  PartScope(const PartScope&) = delete;
  PartScope& operator=(const PartScope&) = delete;

 private:
  static void begin() { nn::begin_part(nn::step_key().part + 1); }
};

}  // namespace

at::Tensor recompute(Recompute how, const std::function<at::Tensor()>& body, const RecomputeHooks& hooks) {
  const PartScope part;
  if (how == Recompute::kNone || SaverScope::is_active() || !at::GradMode::is_enabled()) return body();
  return how == Recompute::kFull ? recompute_full(body, hooks) : recompute_selective(body, hooks);
}

}  // namespace lockstep
