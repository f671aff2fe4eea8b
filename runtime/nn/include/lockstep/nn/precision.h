#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

namespace lockstep::nn {

/// Mixed precision for the scope: matrix products in bf16, parameters and sums in f32. Off: plain f32. Restores what
/// was before. Per thread. LibTorch's own weight cache is kept off: it adds the two gradients of a tied weight in bf16
/// and goes stale.
class AutocastGuard {
 public:
  AutocastGuard(c10::DeviceType device, bool bf16);
  ~AutocastGuard();
  AutocastGuard(const AutocastGuard&) = delete;
  AutocastGuard& operator=(const AutocastGuard&) = delete;

 private:
  c10::DeviceType device_;
  bool was_enabled_, was_cached_;
  c10::ScalarType was_dtype_;
};

/// Whether this thread is inside a bf16 AutocastGuard.
bool is_bf16(c10::DeviceType device = c10::DeviceType::CPU);

/// For the scope, this thread may use bf16 copies of weights made earlier in the same generation, by any thread:
/// weights do not change within a step, so each is cast once a step instead of once a micro-batch and lane.
class WeightCacheScope {
 public:
  explicit WeightCacheScope(bool on = true);
  ~WeightCacheScope();
  WeightCacheScope(const WeightCacheScope&) = delete;
  WeightCacheScope& operator=(const WeightCacheScope&) = delete;

  static bool is_on();

 private:
  bool was_;
};

/// Forgets all bf16 copies. Call whenever weights may have changed; the Trainer does so at each step and evaluation.
void begin_step();

}  // namespace lockstep::nn
