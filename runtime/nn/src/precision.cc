#include <atomic>
#include <map>
#include <mutex>
#include <vector>

#include <ATen/autocast_mode.h>

#include <lockstep/nn/precision.h>

#include "weight_cache.h"

namespace lockstep::nn {
namespace {

struct CachedWeight {
  std::vector<int64_t> sizes, strides;  // a weight and its transpose have the same address
  uint64_t generation = 0;
  uint32_t version = 0;
  at::Tensor copy;
};

// Keyed by address: lanes have their own Tensor objects over one storage.
struct WeightCache {
  std::mutex mutex;
  std::map<std::pair<const void*, int64_t>, CachedWeight> weights;
};

WeightCache& cache() {
  static auto* const instance = new WeightCache;  // never destroyed: threads may still be casting when statics go
  return *instance;
}

std::atomic<uint64_t> g_generation{1};
thread_local bool t_may_cache = false;

}  // namespace

AutocastGuard::AutocastGuard(c10::DeviceType device, bool bf16)
    : device_(device),
      was_enabled_(at::autocast::is_autocast_enabled(device)),
      was_cached_(at::autocast::is_autocast_cache_enabled()),
      was_dtype_(at::autocast::get_autocast_dtype(device)) {
  at::autocast::set_autocast_dtype(device, at::kBFloat16);
  at::autocast::set_autocast_enabled(device, bf16);
  at::autocast::set_autocast_cache_enabled(false);
}

AutocastGuard::~AutocastGuard() {
  at::autocast::set_autocast_dtype(device_, was_dtype_);
  at::autocast::set_autocast_enabled(device_, was_enabled_);
  at::autocast::set_autocast_cache_enabled(was_cached_);
}

bool is_bf16(c10::DeviceType device) {
  return at::autocast::is_autocast_enabled(device) && at::autocast::get_autocast_dtype(device) == at::kBFloat16;
}

WeightCacheScope::WeightCacheScope(bool on) : was_(t_may_cache) { t_may_cache = on; }
WeightCacheScope::~WeightCacheScope() { t_may_cache = was_; }
bool WeightCacheScope::is_on() { return t_may_cache; }

void begin_step() { ++g_generation; }

at::Tensor bf16_weight(const at::Tensor& weight) {
  const at::Tensor plain = weight.detach();
  if (!t_may_cache) return plain.to(at::kBFloat16);
  const std::lock_guard lock(cache().mutex);  // held while casting, so that a second lane waits instead of casting too
  auto& [sizes, strides, generation, version, copy] = cache().weights[{plain.const_data_ptr(), plain.numel()}];
  const bool same_view = plain.sizes() == sizes && plain.strides() == strides;
  if (!same_view || generation != g_generation || version != plain._version()) {
    copy = plain.to(at::kBFloat16);  // a new one: graphs may still hold the old one's memory
    sizes = plain.sizes().vec();
    strides = plain.strides().vec();
    generation = g_generation;
    version = plain._version();
  }
  return copy;
}

}  // namespace lockstep::nn
