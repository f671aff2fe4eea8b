#pragma once

#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>

namespace lockstep::nn {

/// Fill a parameter from its own random stream, named by (seed, name): element i depends on nothing else, so any shard
/// of any layout gets the same values.
void fill_normal(const at::Tensor& parameter, uint64_t seed, const std::string& name, double standard_deviation);
void fill_uniform(const at::Tensor& parameter, uint64_t seed, const std::string& name, double bound);
void fill_constant(const at::Tensor& parameter, double value);

}  // namespace lockstep::nn
