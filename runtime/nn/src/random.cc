#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/remake.h>

namespace lockstep::nn {
namespace {

template <typename Value>
void fill(const at::Tensor& parameter, Value value) {
  const at::Tensor host = at::empty(parameter.sizes(), at::kFloat);
  auto* out = host.mutable_data_ptr<float>();
  for (int64_t i = 0; i < host.numel(); ++i) out[i] = value(static_cast<uint64_t>(i));
  parameter.detach().copy_(host);
}

// 0 with probability p, else 1 / (1 - p), in the dtype and on the device of `options`.
at::Tensor dropout_mask(at::IntArrayRef sizes, const at::TensorOptions& options, double p, uint64_t key) {
  const auto keep_below = static_cast<uint64_t>((1.0 - p) * 0x1p32);
  const auto scale = static_cast<float>(1.0 / (1.0 - p));
  const at::Tensor mask = at::empty(sizes, at::kFloat);
  auto* out = mask.mutable_data_ptr<float>();
  const int64_t n = mask.numel();
  for (int64_t i = 0; i < n; i += 4) {
    const auto bits = philox4x32(key, static_cast<uint64_t>(i / 4), 0);
    for (int64_t j = 0; j < 4 && i + j < n; ++j) out[i + j] = bits[j] < keep_below ? scale : 0.0f;
  }
  return mask.to(options.device(), c10::typeMetaToScalarType(options.dtype()));
}

}  // namespace

at::Tensor dropout(const at::Tensor& x, double p, bool training, uint64_t layer) {
  if (!training || p <= 0) return x;
  const StepKey now = step_key();
  const uint64_t key = stream_key(stream_key(now.seed, now.step, now.leaf, layer), "dropout");
  const auto make = [sizes = x.sizes().vec(), options = x.options(), p, key](const std::vector<at::Tensor>& = {}) {
    return dropout_mask(sizes, options, p, key);
  };
  return at::mul(x, remakeable(make(), {}, make));
}

void fill_normal(const at::Tensor& parameter, uint64_t seed, const std::string& name, double standard_deviation) {
  const uint64_t key = stream_key(seed, name);
  const auto scale = static_cast<float>(standard_deviation);
  fill(parameter, [&](uint64_t i) { return scale * normal_at(key, i); });
}

void fill_uniform(const at::Tensor& parameter, uint64_t seed, const std::string& name, double bound) {
  const uint64_t key = stream_key(seed, name);
  const auto scale = static_cast<float>(bound);
  fill(parameter, [&](uint64_t i) { return scale * (2.0f * uniform_at(key, i) - 1.0f); });
}

void fill_constant(const at::Tensor& parameter, double value) {
  fill(parameter, [&](uint64_t) { return static_cast<float>(value); });
}

}  // namespace lockstep::nn
