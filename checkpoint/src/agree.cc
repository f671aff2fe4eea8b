#include <cstring>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include "epoch.h"

namespace lockstep::checkpoint {

at::Tensor broadcast_number(ProcessGroup& world, int64_t value) {
  at::Tensor number = at::full({1}, value, at::kLong);
  world.broadcast(number, 0).wait();
  return number;
}

std::string broadcast_text(ProcessGroup& world, const std::string& text) {
  const int64_t length = *broadcast_number(world, static_cast<int64_t>(text.size())).const_data_ptr<int64_t>();
  at::Tensor bytes = at::empty({length}, at::kByte);
  if (world.rank() == 0 && length > 0) std::memcpy(bytes.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  world.broadcast(bytes, 0).wait();
  return {reinterpret_cast<const char*>(bytes.const_data_ptr<uint8_t>()), static_cast<size_t>(length)};
}

bool all_agree(ProcessGroup& world, bool mine) {
  const std::byte flag{mine};
  return all_gather_bytes(world, std::span(&flag, 1)).find('\0') == std::string::npos;
}

}  // namespace lockstep::checkpoint
