#include <set>

#include <lockstep/base/error.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

#include "agree.h"
#include "plan.h"
#include "save.h"
#include "staging.h"
#include "tensor_bytes.h"

namespace lockstep::checkpoint {

std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "F64";
    case at::kFloat:
      return "F32";
    case at::kHalf:
      return "F16";
    case at::kBFloat16:
      return "BF16";
    case at::kLong:
      return "I64";
    case at::kInt:
      return "I32";
    case at::kShort:
      return "I16";
    case at::kChar:
      return "I8";
    case at::kByte:
      return "U8";
    case at::kBool:
      return "BOOL";
    default:
      throw CheckFailed(std::string("dtype ") + at::toString(type) + " cannot be stored in a checkpoint");
  }
}

uint64_t acquire_epoch(Fs& fs, ProcessGroup& world, const std::string& run_dir, const format::Starter& starter) {
  const auto create = [&] { return std::to_string(format::create_epoch(fs, run_dir, starter)); };
  return std::stoull(on_chief(world, ProcessGroup::kDefaultTimeout, create));
}

uint64_t acquire_epoch(Fs& fs, ProcessGroup& world, const std::string& run_dir, bool take_over) {
  return acquire_epoch(fs, world, run_dir, format::Starter{.take_over = take_over});
}

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

Store::Store(Fs& fs, ProcessGroup& world, Options options) : fs_(fs), world_(world), options_(std::move(options)) {
  LOCKSTEP_CHECK(options_.keep_last >= 2)
      << "keep_last is " << options_.keep_last << "; 2 is the least: one to fall back to";
}

Store::~Store() = default;

void Store::check_not_fenced() {
  const uint64_t newest = format::newest_epoch(fs_, options_.run_dir);
  if (newest > options_.epoch) {
    throw Fenced("epoch " + std::to_string(newest) + " has taken over '" + options_.run_dir +
                 "' from this start (epoch " + std::to_string(options_.epoch) + ")");
  }
}

void Store::as_owner(const std::function<void()>& work) {
  on_chief(world_, options_.timeout, [&] {
    check_not_fenced();
    work();
    return std::string();
  });
}

// Wrong bytes under a right name are what a checkpoint must never hold, so the caller's state is not taken on trust.
void Store::check_state(const std::vector<StateTensor>& state) const {
  std::set<std::string> keys;
  for (const StateTensor& tensor : state) {
    const ShardLayout& layout = tensor.layout;
    const std::string key = format::tensor_key(tensor.section, layout.name);
    LOCKSTEP_CHECK(keys.insert(key).second) << "two tensors are called " << key;
    LOCKSTEP_CHECK(format::is_tensor_name(key) && format::section_of(key) == tensor.section)
        << "'" << key << "' cannot name a tensor of section '" << tensor.section << "'";
    LOCKSTEP_CHECK(layout.boxes.size() == static_cast<size_t>(world_.size()))
        << key << " has boxes for " << layout.boxes.size() << " ranks of " << world_.size();
    layout.check();
    LOCKSTEP_CHECK(tensor.local.numel() == layout.boxes[world_.rank()].numel() &&
                   dtype_name(tensor.local.scalar_type()) == layout.dtype)
        << key << ": the local tensor has " << tensor.local.numel() << " elements of "
        << dtype_name(tensor.local.scalar_type()) << ", its box holds "
        << describe(layout.dtype, layout.boxes[world_.rank()].sizes);
  }
}

}  // namespace lockstep::checkpoint
