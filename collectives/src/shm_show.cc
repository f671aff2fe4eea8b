#include <algorithm>
#include <cstring>
#include <span>

#include <lockstep/base/error.h>

#include "shm_collectives.h"

namespace lockstep {
namespace {

// A rank's letter tells where each of its tensors lies.
class Show : public ShmExchange {
 public:
  Show(std::shared_ptr<ShmChannel> channel, const std::vector<at::Tensor>& tensors, Milliseconds timeout)
      : ShmExchange(std::move(channel), {.call = ShmCall::kShow}, timeout) {
    LOCKSTEP_CHECK(tensors.size() * sizeof(int64_t) <= kShmLetterBytes) << tensors.size() << " tensors to show";
    for (const at::Tensor& tensor : tensors) {
      keep(tensor);
      const auto bytes = static_cast<int64_t>(tensor.nbytes());
      auto offset = channel_->memory->offset_of(tensor.const_data_ptr(), bytes);
      if (!offset && bytes > 0) {
        copies_.push_back(channel_->memory->allocate(bytes));
        if (!copies_.back()) no_memory_left();
        std::memcpy(copies_.back().data(), tensor.const_data_ptr(), tensor.nbytes());
        offset = copies_.back().offset();
      }
      offsets_.push_back(offset.value_or(0));
    }
    rounds_ = 1;
    must_linger_ = true;
  }

  const void* data(int rank, size_t index) const {
    const int64_t offset = reinterpret_cast<const int64_t*>(letter(rank))[index];
    return channel_->memory->at(channel_->arenas[rank], offset);
  }
  void wait_for_all() {
    wait_until([this] { return have_met(); });
  }
  void done() {
    is_read_ = true;
    wait();
  }
  bool poll_for_all() {
    poll();
    return have_met();
  }

 private:
  void post() override { std::ranges::copy(std::as_bytes(std::span(offsets_)), letter(channel_->rank)); }
  bool may_take() const override { return is_read_; }
  void keep_rest_for_ever() override {
    for (auto& copy : copies_) keep_for_ever({}, std::move(copy));
  }

  std::vector<int64_t> offsets_;
  std::vector<ShmMemory::Block> copies_;
  std::atomic<bool> is_read_{false};
};

class ShownByShm : public Shown {
 public:
  ShownByShm(std::shared_ptr<ShmChannel> channel, const std::vector<at::Tensor>& tensors, Milliseconds timeout)
      : show_(std::move(channel), tensors, timeout) {}
  bool poll() override { return show_.poll_for_all(); }
  void wait() override { show_.wait_for_all(); }
  const void* data(int rank, size_t index) const override { return show_.data(rank, index); }
  void done() override { show_.done(); }

 private:
  ShmStarted<Show> show_;
};

class Forwarded : public ShmOperation {
 public:
  Forwarded(std::shared_ptr<ShmChannel> channel, std::string doing, Work work, Milliseconds timeout)
      : ShmOperation(std::move(channel), timeout), doing_(std::move(doing)), work_(std::move(work)) {}

 private:
  Progress advance() override { return work_.poll() ? Progress::kDone : Progress::kNone; }
  std::string doing() const override { return doing_; }

  std::string doing_;
  Work work_;
};

}  // namespace

std::unique_ptr<Shown> shm_show(std::shared_ptr<ShmChannel> channel, const std::vector<at::Tensor>& tensors,
                                Milliseconds timeout) {
  return std::make_unique<ShownByShm>(std::move(channel), tensors, timeout);
}

ShmWork shm_forwarded(std::shared_ptr<ShmChannel> channel, std::string doing, Work work, Milliseconds timeout) {
  return std::make_unique<ShmStarted<Forwarded>>(std::move(channel), std::move(doing), std::move(work), timeout);
}

}  // namespace lockstep
