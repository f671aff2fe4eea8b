#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace lockstep::nn {

/// Fill a parameter from its own random stream, named by (seed, name): element i depends on nothing else, so any shard
/// of any layout gets the same values.
void fill_normal(const at::Tensor& parameter, uint64_t seed, const std::string& name, double standard_deviation);
void fill_uniform(const at::Tensor& parameter, uint64_t seed, const std::string& name, double bound);
void fill_constant(const at::Tensor& parameter, double value);

/// Fills `part`, a box of a tensor of `shape` that begins at `offsets`, with what `fill` writes to the whole tensor.
///
/// `fill` is first given a tensor of that shape without memory: if all it does is one of the calls above, only the part
/// is drawn. Whatever else touches that tensor fails inside it, and `fill` is called again, with memory for all of it.
void fill_box(const at::Tensor& part, at::IntArrayRef shape, const std::vector<int64_t>& offsets,
              const std::function<void(const at::Tensor& whole)>& fill);

}  // namespace lockstep::nn
