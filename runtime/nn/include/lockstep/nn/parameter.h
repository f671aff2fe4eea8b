#pragma once

#include <ATen/core/Tensor.h>

namespace lockstep::nn {

/// Within this scope, on this thread, layers are built whose parameters get their memory later, shard by shard or from
/// another use of the same weight. Our own layers' large ones take none until they are touched; others give theirs back
/// unit by unit.
class WithoutStorage {
 public:
  WithoutStorage();
  ~WithoutStorage();
  WithoutStorage(const WithoutStorage&) = delete;
  WithoutStorage& operator=(const WithoutStorage&) = delete;
  static bool is_on();

 private:
  bool was_;
};

/// f32 zeros for a layer's weight.
at::Tensor new_parameter(at::IntArrayRef sizes);

}  // namespace lockstep::nn
