#include <limits>
#include <utility>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/init.h>
#include <lockstep/nn/remake.h>

namespace lockstep::nn {
namespace {

// The part that is filled instead of a whole tensor, which is there for its shape alone.
struct Box {
  const at::Tensor& whole;
  const at::Tensor& part;
  const std::vector<int64_t>& offsets;
  bool is_filled = false;
};
thread_local Box* t_box = nullptr;

// The index in the whole tensor of the first element of the part's run `run` along the last dim.
int64_t first_of_run(const Box& box, int64_t run) {
  const int64_t dims = box.part.dim();
  int64_t first = dims == 0 ? 0 : box.offsets[dims - 1], stride = dims == 0 ? 1 : box.whole.size(dims - 1);
  for (int64_t dim = dims - 2; dim >= 0; --dim) {
    first += (box.offsets[dim] + run % box.part.size(dim)) * stride;
    run /= box.part.size(dim);
    stride *= box.whole.size(dim);
  }
  return first;
}

template <typename Value>
void fill(const at::Tensor& parameter, Value value) {
  Box* const box = t_box != nullptr && t_box->whole.is_same(parameter) ? t_box : nullptr;
  const at::Tensor target = (box ? box->part : parameter).detach();
  const bool is_in_place = target.is_cpu() && target.scalar_type() == at::kFloat && target.is_contiguous();
  const at::Tensor host = is_in_place ? target : at::empty(target.sizes(), at::kFloat);
  auto* out = host.mutable_data_ptr<float>();
  const int64_t run_length = box && box->part.dim() > 0 ? box->part.size(-1) : host.numel();
  for (int64_t done = 0; done < host.numel(); done += run_length) {
    const int64_t first = box ? first_of_run(*box, done / run_length) : 0;
    for (int64_t i = 0; i < run_length; ++i) out[done + i] = value(static_cast<uint64_t>(first + i));
  }
  if (!is_in_place) target.copy_(host);
  if (box) box->is_filled = true;
}

// Whether `fill` did no more than what draws a part alone.
bool fills_part(Box& box, const std::function<void(const at::Tensor&)>& fill) {
  Box* const outer = std::exchange(t_box, &box);
  try {
    fill(box.whole);
  } catch (const c10::Error&) {  // it asked for memory
    box.is_filled = false;
  } catch (...) {
    t_box = outer;
    throw;
  }
  t_box = outer;
  return box.is_filled;
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

void fill_box(const at::Tensor& part, at::IntArrayRef shape, const std::vector<int64_t>& offsets,
              const std::function<void(const at::Tensor&)>& fill) {
  if (part.sizes() == shape) return fill(part.detach());
  if (part.numel() == 0) return;
  const at::Tensor shape_alone = at::empty({0}, part.options().requires_grad(false));
  shape_alone.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
  shape_alone.storage().unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "only a part of this parameter is here");
  if (Box box{shape_alone, part, offsets}; fills_part(box, fill)) return;
  constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();
  const at::Tensor whole = at::full(shape, kNothing, part.options().requires_grad(false));
  fill(whole);
  at::Tensor box = whole;
  for (int64_t dim = 0; dim < part.dim(); ++dim) box = box.narrow(dim, offsets[dim], part.size(dim));
  part.detach().copy_(box);
}

}  // namespace lockstep::nn
