#include <cstring>

#include <ATen/ops/empty.h>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

void Work::wait() {
  if (!operation_) return;
  operation_->wait();
  operation_.reset();
}

bool Work::poll() {
  if (operation_ && operation_->poll()) operation_.reset();
  return !operation_;
}

std::string all_gather_bytes(ProcessGroup& group, std::span<const std::byte> value) {
  const auto n = static_cast<int64_t>(value.size());
  at::Tensor mine = at::empty({n}, at::kByte), all = at::empty({n * group.size()}, at::kByte);
  if (n > 0) std::memcpy(mine.mutable_data_ptr<uint8_t>(), value.data(), value.size());
  group.all_gather(all, mine).wait();
  return {reinterpret_cast<const char*>(all.const_data_ptr<uint8_t>()), static_cast<size_t>(all.numel())};
}

}  // namespace lockstep
