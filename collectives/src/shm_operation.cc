#include "shm_operation.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include <sched.h>

#include <lockstep/base/error.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace lockstep {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace

void keep_for_ever(std::vector<at::Tensor> tensors, ShmMemory::Block block) {
  struct Kept {
    std::vector<at::Tensor> tensors;
    ShmMemory::Block block;
  };
  static std::mutex mutex;
  static auto& all = *new std::vector<Kept>;
  const std::lock_guard lock(mutex);
  all.push_back({std::move(tensors), std::move(block)});
}

std::string ShmHeading::text() const {
  static constexpr const char* kNames[] = {"barrier",   "all_reduce", "reduce_scatter", "all_gather", "all_to_all",
                                           "broadcast", "show"};
  static constexpr const char* kOps[] = {" (sum)", " (max)", " (min)"};
  std::string text = kNames[static_cast<int>(call)];
  if (call == ShmCall::kBarrier || call == ShmCall::kShow) return text;
  if (call == ShmCall::kAllReduce || call == ShmCall::kReduceScatter) text += kOps[op];
  if (call == ShmCall::kBroadcast) text += " from " + std::to_string(root);
  text += " of ";
  if (call != ShmCall::kAllToAll) text += std::to_string(numel) + " ";
  return text + at::toString(static_cast<at::ScalarType>(dtype));
}

bool ShmChannel::has_slot_for(uint64_t call) {
  if (call < done_by_all + kShmSlots) return true;
  done_by_all = mail[0]->done.load(std::memory_order_acquire);
  for (int other = 1; other < size; ++other)
    done_by_all = std::min(done_by_all, mail[other]->done.load(std::memory_order_acquire));
  return call < done_by_all + kShmSlots;
}

void ShmChannel::finish(uint64_t call) {
  done_out_of_order.set(call % kShmSlots);
  uint64_t done = mail[rank]->done.load(std::memory_order_relaxed);
  for (; done_out_of_order[done % kShmSlots]; ++done) done_out_of_order.reset(done % kShmSlots);
  mail[rank]->done.store(done, std::memory_order_release);
}

std::string ShmChannel::describe(const std::string& doing) const {
  return "[rank " + std::to_string(rank) + "/" + std::to_string(size) + "] " + doing + " in group " + name;
}

void ShmChannel::refuse_if_broken(const std::string& operation) const {
  if (is_broken)
    throw CollectiveError("group " + name + " is unusable after an earlier error; " + operation + " was not started");
}

ShmOperation::ShmOperation(std::shared_ptr<ShmChannel> channel, Milliseconds timeout)
    : channel_(std::move(channel)), timeout_(timeout), deadline_(std::chrono::steady_clock::now() + timeout) {}

void ShmOperation::enter() {
  move_on();
  if (is_done_) return;
  auto& progress = channel_->memory->progress();
  const std::lock_guard lock(progress.mutex);
  progress.under_way.push_back(this);
}

void ShmOperation::leave() noexcept {
  auto& progress = channel_->memory->progress();
  const std::lock_guard lock(progress.mutex);
  std::erase(progress.under_way, this);
  if (is_done_) return;
  channel_->is_broken = true;
  kept_.push_back(std::move(first_));
  keep_for_ever(std::move(kept_), {});
  keep_rest_for_ever();
}

ShmOperation::Progress ShmOperation::move_on() {
  if (is_done_) return Progress::kDone;
  const std::lock_guard lock(channel_->memory->progress().mutex);
  if (failure_) std::rethrow_exception(failure_);
  if (channel_->is_broken) throw CollectiveError(channel_->describe(doing()) + " was aborted");
  try {
    const Progress progress = advance();
    is_done_ = progress == Progress::kDone;
    return progress;
  } catch (...) {
    channel_->is_broken = true;
    throw;
  }
}

void ShmOperation::move_others_on() {
  auto& progress = channel_->memory->progress();
  const std::lock_guard lock(progress.mutex);
  for (ShmOperation* other : progress.under_way) {
    if (other == this || other->is_done_ || other->failure_ || other->channel_->is_broken) continue;
    try {
      other->is_done_ = other->advance() == Progress::kDone;
    } catch (...) {  // it is told to whoever waits for that one
      other->failure_ = std::current_exception();
      other->channel_->is_broken = true;
    }
  }
}

// Others too: this one may need the slot of an earlier one.
bool ShmOperation::poll() {
  if (poll_alone()) return true;
  move_others_on();
  return poll_alone();
}

void ShmOperation::wait() {
  wait_until([this] { return is_done(); });
}

void ShmOperation::wait_a_little(int64_t idle) {
  if (idle < channel_->num_spins) return pause();
  move_others_on();
  sched_yield();
  if (idle % 16 != 0) return;
  const auto now = std::chrono::steady_clock::now();
  if (now > deadline_) time_out();
  if (idle <= channel_->num_spins + 16) {  // the first look at the clock
    idle_since_ = now;
  } else if (now - idle_since_ > channel_->awake) {
    // Who comes this late is in no hurry; others want the core.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void ShmOperation::time_out() {
  channel_->is_broken = true;
  throw CollectiveError(
      channel_->describe(doing()) + " timed out after " + std::to_string(timeout_.count()) + " ms" + absent() +
      ". Mend: look for the first ERROR of another rank; run again to go on from the last checkpoint");
}

ShmExchange::ShmExchange(std::shared_ptr<ShmChannel> channel, ShmHeading heading, Milliseconds timeout)
    : ShmOperation(std::move(channel), timeout), heading_(heading), call_(channel_->next_call++) {}

void ShmExchange::keep_rest_for_ever() {
  if (ring_) keep_for_ever({}, std::move(ring_));
}

std::byte* ShmExchange::bring_in_slot(int64_t bytes) {
  const ShmSlot& mine = slot(channel_->rank);
  std::byte* place =
      bytes <= static_cast<int64_t>(sizeof(mine.few)) ? slot(channel_->rank).few : letter(channel_->rank);
  source_ = *channel_->memory->offset_of(place, bytes);
  return place;
}

void ShmExchange::bring_mapped(int64_t offset) {
  source_ = offset;
  must_linger_ = true;
}

void ShmExchange::bring_ring() {
  ring_ = channel_->memory->allocate(channel_->options.round_bytes * kShmDepth);
  if (!ring_) no_memory_left();
  source_ = ring_.offset();
  has_ring_ = true;
  must_linger_ = true;
}

void ShmExchange::bring(const at::Tensor& tensor) {
  if (channel_->size == 1 || tensor.nbytes() == 0) return;
  const auto offset = channel_->memory->offset_of(tensor.const_data_ptr(), static_cast<int64_t>(tensor.nbytes()));
  offset ? bring_mapped(*offset) : bring_ring();
}

void ShmExchange::no_memory_left() {
  channel_->is_broken = true;  // the others wait for a call that does not come
  throw CollectiveError(channel_->describe(doing()) + ": no shared memory is left");
}

std::byte* ShmExchange::source(int rank, uint64_t round) const {
  const int64_t part = is_whole(rank) ? 0 : static_cast<int64_t>(round % kShmDepth) * channel_->options.round_bytes;
  return channel_->memory->at(channel_->arenas[rank], slot(rank).source + part);
}

bool ShmExchange::all_have_posted() {
  while (num_posted_ < channel_->size && slot(num_posted_).call.load(std::memory_order_acquire) == call_ + 1)
    ++num_posted_;
  return num_posted_ == channel_->size;
}

void ShmExchange::compare() {
  for (int rank = 0; rank < channel_->size; ++rank) {
    if (slot(rank).heading == heading_) continue;
    throw ShapeMismatch("group " + channel_->name + ": rank " + std::to_string(channel_->rank) + " calls " +
                        heading_.text() + " while rank " + std::to_string(rank) + " calls " +
                        slot(rank).heading.text());
  }
}

bool ShmExchange::is_behind_all(ShmStep step, uint64_t rounds) {
  if (least_[step] >= rounds) return true;
  uint64_t least = UINT64_MAX;
  for (int rank = 0; rank < channel_->size; ++rank) {
    if (rank == channel_->rank || (step == kStaged && is_whole(rank))) continue;
    least = std::min(least, slot(rank).rounds[step].load(std::memory_order_acquire));
    if (least < rounds) return false;
  }
  least_[step] = least;
  return true;
}

ShmOperation::Progress ShmExchange::advance() {
  bool moved = false;
  if (!is_posted_) {
    if (!channel_->has_slot_for(call_) || !may_post()) return Progress::kNone;
    ShmSlot& mine = slot(channel_->rank);
    mine.heading = heading_;
    mine.source = source_;
    mine.is_whole = has_ring_ ? 0 : 1;
    for (auto& rounds : mine.rounds) rounds.store(0, std::memory_order_relaxed);
    post();
    mine.call.store(call_ + 1, std::memory_order_release);
    is_posted_ = moved = true;
  }
  moved |= fill_ring();
  if (!have_met_) {
    if (!all_have_posted()) return moved ? Progress::kSome : Progress::kNone;
    compare();
    meet();
    have_met_ = true;
    moved = true;
  }
  moved |= run();
  const bool is_over =
      mine_[kTaken] == rounds_ && (!must_linger_ || is_behind_all(is_pushed_ ? kFolded : kTaken, rounds_));
  if (!is_over) return moved ? Progress::kSome : Progress::kNone;
  channel_->finish(call_);
  ring_.reset();
  return Progress::kDone;
}

void ShmExchange::step(ShmStep which) {
  const uint64_t round = mine_[which];
  which == kStaged ? stage(round) : which == kFolded ? fold_round(round) : take(round);
  slot(channel_->rank).rounds[which].store(++mine_[which], std::memory_order_release);
}

bool ShmExchange::fill_ring() {
  const uint64_t staged = mine_[kStaged];
  if (!has_ring_ || staged == rounds_) return false;
  if (staged >= kShmDepth && !(have_met_ && is_behind_all(kTaken, staged - kShmDepth + 1))) return false;
  step(kStaged);
  return true;
}

// At most one round of each step, so that a poll is short.
bool ShmExchange::run() {
  bool moved = false;
  // Where results go by the ring, its part must be free for them: staging has seen to that.
  const uint64_t may_fold = has_ring_ ? mine_[kStaged] : rounds_;
  if (has_fold_ && mine_[kFolded] < may_fold && is_behind_all(kStaged, mine_[kFolded] + 1)) {
    step(kFolded);
    moved = true;
  }
  const uint64_t next = mine_[kTaken] + 1;
  if (next <= rounds_ && may_take() &&
      (is_pushed_ ? mine_[kFolded] >= next
                  : is_behind_all(has_fold_ ? kFolded : kStaged, next) && (!has_fold_ || mine_[kFolded] >= next))) {
    step(kTaken);
    moved = true;
  }
  return moved;
}

std::string ShmExchange::doing() const { return heading_.text() + " (call " + std::to_string(call_ + 1) + ")"; }

std::string ShmExchange::absent() const {
  std::string ranks;
  for (int rank = 0; rank < channel_->size; ++rank) {
    if (slot(rank).call.load(std::memory_order_acquire) < call_ + 1)
      ranks += (ranks.empty() ? ": rank " : ", ") + std::to_string(rank);
  }
  return ranks.empty() ? ": a rank stopped in the middle" : ranks + " did not arrive";
}

void copy_past_caches(std::byte* to, const std::byte* from, int64_t bytes) {
#if defined(__x86_64__)
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 16);
  const int64_t head = misaligned == 0 ? 0 : std::min(bytes, 16 - misaligned);
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    const auto* in = reinterpret_cast<const __m128i*>(from + i);
    auto* out = reinterpret_cast<__m128i*>(to + i);
    const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2),
                  d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
  _mm_sfence();  // else a later release store could be seen first
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

}  // namespace lockstep
