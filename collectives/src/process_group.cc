#include <cstring>
#include <numeric>

#include <ATen/ops/empty.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/flight/ring.h>

namespace lockstep {

void Work::wait() {
  if (!operation_) return;
  if (ring_ != nullptr) ring_->wait(ticket_);
  try {
    operation_->wait();
  } catch (...) {
    if (ring_ != nullptr) ring_->leave(ticket_);
    throw;
  }
  if (ring_ != nullptr) ring_->done(ticket_);
  operation_.reset();
}

bool Work::poll() {
  if (operation_ && operation_->poll()) {
    if (ring_ != nullptr) ring_->done(ticket_);
    operation_.reset();
  }
  return !operation_;
}

void Work::watch(flight::Ring& ring, uint64_t ticket) {
  if (!operation_) return ring.done(ticket);
  ring_ = &ring;
  ticket_ = ticket;
}

at::Tensor ProcessGroup::empty_mapped(int64_t numel, at::TensorOptions options) { return at::empty({numel}, options); }

std::unique_ptr<Shown> ProcessGroup::show(const std::vector<at::Tensor>&, Milliseconds) { return nullptr; }

std::unique_ptr<ProcessGroup> ProcessGroup::split(int color, int key, const std::string& name) {
  auto part = make_part(color, key, name);
  part->set_control_timeout(control_timeout_);
  return part;
}

std::string all_gather_bytes(ProcessGroup& group, std::span<const std::byte> value) {
  const auto n = static_cast<int64_t>(value.size());
  at::Tensor mine = at::empty({n}, at::kByte), all = at::empty({n * group.size()}, at::kByte);
  if (n > 0) std::memcpy(mine.mutable_data_ptr<uint8_t>(), value.data(), value.size());
  group.all_gather(all, mine, group.control_timeout()).wait();
  return {reinterpret_cast<const char*>(all.const_data_ptr<uint8_t>()), static_cast<size_t>(all.numel())};
}

std::vector<std::string> all_gather_text(ProcessGroup& group, const std::string& text) {
  const auto mine = static_cast<int64_t>(text.size());
  const std::string sizes = all_gather_bytes(group, std::as_bytes(std::span(&mine, 1)));
  std::vector<int64_t> counts(group.size());
  std::memcpy(counts.data(), sizes.data(), sizes.size());
  at::Tensor bytes = at::empty({mine}, at::kByte);
  if (mine > 0) std::memcpy(bytes.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  at::Tensor all = at::empty({std::accumulate(counts.begin(), counts.end(), int64_t{0})}, at::kByte);
  group.all_gather_uneven(all, bytes, counts, group.control_timeout()).wait();
  std::vector<std::string> texts;
  const auto* next = reinterpret_cast<const char*>(all.const_data_ptr<uint8_t>());
  for (const int64_t count : counts) {
    texts.emplace_back(next, static_cast<size_t>(count));
    next += count;
  }
  return texts;
}

}  // namespace lockstep
