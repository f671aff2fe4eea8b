#include <utility>

#include <sys/mman.h>

#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>

#include <lockstep/nn/parameter.h>

namespace lockstep::nn {
namespace {

constexpr int64_t kLarge = 1 << 20;

thread_local bool t_without_storage = false;

}  // namespace

WithoutStorage::WithoutStorage() : was_(std::exchange(t_without_storage, true)) {}
WithoutStorage::~WithoutStorage() { t_without_storage = was_; }
bool WithoutStorage::is_on() { return t_without_storage; }

// Addresses whose pages are made when they are written to: a layer may still set its weights as it is built.
at::Tensor new_parameter(at::IntArrayRef sizes) {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(sizeof(float));
  if (!t_without_storage || bytes < kLarge) return at::zeros(sizes, at::kFloat);
  void* pages = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, /*fd=*/-1, /*offset=*/0);
  if (pages == MAP_FAILED) return at::zeros(sizes, at::kFloat);
  return at::from_blob(
      pages, sizes, [bytes](void* data) { munmap(data, static_cast<size_t>(bytes)); }, at::kFloat);
}

}  // namespace lockstep::nn
