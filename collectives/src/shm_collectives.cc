#include "shm_collectives.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include <lockstep/base/error.h>

namespace lockstep {
namespace {

constexpr int64_t kLine = 64;
// Tensors from this size on are copied past the caches: to read lines that another core has just written is slower than
// to read memory, unless they are few.
constexpr int64_t kPastCachesBytes = int64_t{4} << 20;

struct Range {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};

Range round_of(uint64_t round, int64_t each, int64_t all) {
  const int64_t begin = std::min(all, static_cast<int64_t>(round) * each);
  return {begin, std::min(all, begin + each)};
}

uint64_t rounds_for(int64_t all, int64_t each) { return static_cast<uint64_t>((all + each - 1) / each); }

const std::byte* data_of(const at::Tensor& tensor) { return static_cast<const std::byte*>(tensor.const_data_ptr()); }
std::byte* mutable_data_of(const at::Tensor& tensor) { return static_cast<std::byte*>(tensor.mutable_data_ptr()); }

void copy_bytes(std::byte* to, const std::byte* from, int64_t bytes) {
  if (to != from && bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

int8_t checked(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kDouble:
    case at::kBFloat16:
    case at::kHalf:
    case at::kInt:
    case at::kLong:
    case at::kByte:
      return static_cast<int8_t>(type);
    default:
      throw CheckFailed(std::string("no collective for dtype ") + at::toString(type) +
                        "; f32, f64, bf16, f16, i32, i64, u8 travel");
  }
}

ShmHeading heading(ShmCall call, const at::Tensor& tensor, ReduceOp op = ReduceOp::kSum) {
  return {
      .call = call, .op = static_cast<uint8_t>(op), .dtype = checked(tensor.scalar_type()), .numel = tensor.numel()};
}

// What the calls below have in common: elements, and copies of results.
class Collective : public ShmExchange {
 protected:
  Collective(std::shared_ptr<ShmChannel> channel, ShmHeading heading, const at::Tensor& of, Milliseconds timeout)
      : ShmExchange(std::move(channel), heading, timeout),
        dtype_(of.scalar_type()),
        itemsize_(static_cast<int64_t>(of.element_size())),
        me_(channel_->rank),
        size_(channel_->size) {}

  int64_t bytes(int64_t elements) const { return elements * itemsize_; }
  // Elements of each of `lanes` parts of a ring's round, whole lines.
  int64_t elements_of_lane(int lanes) const {
    return std::max(kLine, channel_->options.round_bytes / lanes / kLine * kLine) / itemsize_;
  }
  void deliver(std::byte* to, const std::byte* from, int64_t bytes, int64_t whole_bytes) const {
    whole_bytes >= kPastCachesBytes ? copy_past_caches(to, from, bytes) : copy_bytes(to, from, bytes);
  }

  const at::ScalarType dtype_;
  const int64_t itemsize_;
  const int me_, size_;
};

class Barrier : public ShmExchange {
 public:
  Barrier(std::shared_ptr<ShmChannel> channel, Milliseconds timeout)
      : ShmExchange(std::move(channel), {.call = ShmCall::kBarrier}, timeout) {}
};

// Every rank has every rank's numbers in front of it and adds them itself: one meeting, and nothing to come back for.
class SmallAllReduce : public Collective {
 public:
  SmallAllReduce(std::shared_ptr<ShmChannel> channel, const at::Tensor& tensor, ReduceOp op, Milliseconds timeout)
      : Collective(std::move(channel), heading(ShmCall::kAllReduce, tensor, op), tensor, timeout),
        data_(mutable_data_of(tensor)),
        numel_(tensor.numel()),
        op_(op),
        place_(bring_in_slot(bytes(numel_))) {
    keep(tensor);
  }

 private:
  void post() override { copy_bytes(place_, data_, bytes(numel_)); }
  void meet() override {
    std::array<const std::byte*, 16> few;
    std::vector<const std::byte*> many(size_ > 16 ? size_ : 0);
    const std::byte** terms = size_ > 16 ? many.data() : few.data();
    for (int rank = 0; rank < size_; ++rank) terms[rank] = rank == me_ ? data_ : source(rank, 0);
    fold(channel_->plan, dtype_, op_, {terms, static_cast<size_t>(size_)}, data_, numel_);
  }

  std::byte* data_;
  int64_t numel_;
  ReduceOp op_;
  std::byte* place_;
};

// Each round is cut into a part a rank. The owner of a part folds it: from all ranks' mapped tensors into all of them,
// or, where a tensor is not mapped, by way of the rings.
class LargeAllReduce : public Collective {
 public:
  LargeAllReduce(std::shared_ptr<ShmChannel> channel, const at::Tensor& tensor, ReduceOp op, Milliseconds timeout)
      : Collective(std::move(channel), heading(ShmCall::kAllReduce, tensor, op), tensor, timeout),
        data_(mutable_data_of(tensor)),
        numel_(tensor.numel()),
        each_(channel_->options.round_bytes / itemsize_),
        op_(op),
        terms_(size_) {
    keep(tensor);
    bring(tensor);
    rounds_ = rounds_for(numel_, each_);
    has_fold_ = true;
  }

 private:
  // Part of `rank` in a round, in elements from the round's begin.
  Range part(const Range& round, int rank) const {
    const int64_t lines = (bytes(round.count()) + kLine - 1) / kLine;
    const int64_t each = (lines + size_ - 1) / size_ * (kLine / itemsize_);
    return {std::min(round.count(), rank * each), std::min(round.count(), (rank + 1) * each)};
  }

  std::byte* place(int rank, uint64_t round, const Range& range, const Range& part) const {
    return source(rank, round) + bytes(part.begin + (is_whole(rank) ? range.begin : 0));
  }

  void meet() override {
    is_pushed_ = true;
    for (int rank = 0; rank < size_; ++rank) is_pushed_ &= is_whole(rank);
  }

  void stage(uint64_t round) override {
    const Range range = round_of(round, each_, numel_);
    for (int rank = 0; rank < size_; ++rank) {
      if (rank == me_) continue;
      const Range theirs = part(range, rank);
      deliver(source(me_, round) + bytes(theirs.begin), data_ + bytes(range.begin + theirs.begin),
              bytes(theirs.count()), bytes(numel_));
    }
  }

  void fold_round(uint64_t round) override {
    const Range range = round_of(round, each_, numel_), mine = part(range, me_);
    std::byte* out = data_ + bytes(range.begin + mine.begin);
    for (int rank = 0; rank < size_; ++rank) terms_[rank] = rank == me_ ? out : place(rank, round, range, mine);
    fold(channel_->plan, dtype_, op_, terms_, out, mine.count());
    if (is_pushed_) {  // what was read was just here, so that its lines are in the cache to be written
      for (int rank = 0; rank < size_; ++rank)
        if (rank != me_) copy_bytes(place(rank, round, range, mine), out, bytes(mine.count()));
    } else if (!is_whole(me_)) {
      deliver(source(me_, round) + bytes(mine.begin), out, bytes(mine.count()), bytes(numel_));
    }
  }

  void take(uint64_t round) override {
    if (is_pushed_) return;
    const Range range = round_of(round, each_, numel_);
    for (int step = 1; step < size_; ++step) {
      const int owner = (me_ + step) % size_;
      const Range theirs = part(range, owner);
      deliver(data_ + bytes(range.begin + theirs.begin), place(owner, round, range, theirs), bytes(theirs.count()),
              bytes(numel_));
    }
  }

  std::byte* data_;
  int64_t numel_, each_;
  ReduceOp op_;
  std::vector<const std::byte*> terms_;
};

class ReduceScatter : public Collective {
 public:
  ReduceScatter(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input, ReduceOp op,
                Milliseconds timeout)
      : Collective(std::move(channel), heading(ShmCall::kReduceScatter, input, op), input, timeout),
        in_(data_of(input)),
        out_(mutable_data_of(output)),
        numel_(output.numel()),
        each_(elements_of_lane(size_)),
        op_(op),
        terms_(size_) {
    keep(input);
    keep(output);
    if (bytes(input.numel()) <= channel_->options.letter_bytes) {
      place_ = bring_in_slot(bytes(input.numel()));
    } else {
      bring(input);
    }
    rounds_ = rounds_for(numel_, each_);
  }

 private:
  void post() override {
    if (place_ != nullptr) copy_bytes(place_, in_, bytes(numel_ * size_));
  }
  void stage(uint64_t round) override {
    const Range range = round_of(round, each_, numel_);
    for (int rank = 0; rank < size_; ++rank) {
      if (rank != me_)
        deliver(source(me_, round) + bytes(rank * each_), in_ + bytes(rank * numel_ + range.begin),
                bytes(range.count()), bytes(numel_ * size_));
    }
  }
  void take(uint64_t round) override {
    const Range range = round_of(round, each_, numel_);
    const int64_t whole = me_ * numel_ + range.begin;
    for (int rank = 0; rank < size_; ++rank) {
      terms_[rank] =
          rank == me_ ? in_ + bytes(whole) : source(rank, round) + bytes(is_whole(rank) ? whole : me_ * each_);
    }
    fold(channel_->plan, dtype_, op_, terms_, out_ + bytes(range.begin), range.count());
  }

  const std::byte* in_;
  std::byte* out_;
  int64_t numel_, each_;
  ReduceOp op_;
  std::byte* place_ = nullptr;
  std::vector<const std::byte*> terms_;
};

class AllGather : public Collective {
 public:
  AllGather(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
            std::span<const int64_t> counts, Milliseconds timeout)
      : Collective(std::move(channel), heading(ShmCall::kAllGather, output), output, timeout),
        in_(data_of(input)),
        out_(mutable_data_of(output)),
        all_bytes_(static_cast<int64_t>(output.nbytes())),
        counts_(counts.begin(), counts.end()),
        offsets_(size_, 0),
        each_(elements_of_lane(1)) {
    keep(input);
    keep(output);
    std::partial_sum(counts_.begin(), counts_.end() - 1, offsets_.begin() + 1);
    const int64_t most = *std::max_element(counts_.begin(), counts_.end());
    if (bytes(most) <= channel_->options.letter_bytes) {
      place_ = bring_in_slot(bytes(counts_[me_]));
    } else {
      bring(input);
    }
    rounds_ = rounds_for(most, each_);
    copy_bytes(out_ + bytes(offsets_[me_]), in_, bytes(counts_[me_]));
  }

 private:
  void post() override {
    if (place_ != nullptr) copy_bytes(place_, in_, bytes(counts_[me_]));
  }
  void stage(uint64_t round) override {
    const Range range = round_of(round, each_, counts_[me_]);
    deliver(source(me_, round), in_ + bytes(range.begin), bytes(range.count()), all_bytes_);
  }
  void take(uint64_t round) override {
    for (int step = 1; step < size_; ++step) {  // each rank begins with another one
      const int from = (me_ + step) % size_;
      const Range range = round_of(round, each_, counts_[from]);
      deliver(out_ + bytes(offsets_[from] + range.begin),
              source(from, round) + (is_whole(from) ? bytes(range.begin) : 0), bytes(range.count()), all_bytes_);
    }
  }

  const std::byte* in_;
  std::byte* out_;
  int64_t all_bytes_;
  std::vector<int64_t> counts_, offsets_;
  int64_t each_;
  std::byte* place_ = nullptr;
};

// A rank's letter tells where in its source the part for each rank begins, and how long it is.
class AllToAll : public Collective {
 public:
  AllToAll(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
           std::span<const int64_t> receive_counts, std::span<const int64_t> send_counts, Milliseconds timeout)
      : Collective(std::move(channel), {.call = ShmCall::kAllToAll, .dtype = checked(input.scalar_type())}, input,
                   timeout),
        in_(data_of(input)),
        out_(mutable_data_of(output)),
        all_bytes_(static_cast<int64_t>(output.nbytes())),
        counts_(send_counts.begin(), send_counts.end()),
        offsets_(size_, 0),
        wanted_(receive_counts.begin(), receive_counts.end()),
        out_offsets_(size_, 0),
        each_(elements_of_lane(size_)) {
    keep(input);
    keep(output);
    std::partial_sum(counts_.begin(), counts_.end() - 1, offsets_.begin() + 1);
    std::partial_sum(wanted_.begin(), wanted_.end() - 1, out_offsets_.begin() + 1);
    const int64_t table = int64_t{2} * size_ * static_cast<int64_t>(sizeof(int64_t));
    LOCKSTEP_CHECK(table <= kShmLetterBytes) << "an all_to_all of " << size_ << " ranks of one node";
    rounds_ = rounds_for(*std::max_element(counts_.begin(), counts_.end()), each_);
    if (table + bytes(input.numel()) <= channel_->options.letter_bytes) {
      bring_in_slot(kShmLetterBytes);
      is_small_ = true;
    } else {
      bring(input);
    }
    copy_bytes(out_ + bytes(out_offsets_[me_]), in_ + bytes(offsets_[me_]), bytes(counts_[me_]));
  }

 private:
  struct Entry {
    int64_t offset, count;  // bytes from the source, elements
  };

  void post() override {
    auto* table = reinterpret_cast<Entry*>(letter(me_));
    const int64_t begin = is_small_ ? static_cast<int64_t>(sizeof(Entry)) * size_ : 0;
    for (int rank = 0; rank < size_; ++rank) table[rank] = {begin + bytes(offsets_[rank]), counts_[rank]};
    if (is_small_) copy_bytes(letter(me_) + begin, in_, bytes(offsets_.back() + counts_.back()));
  }
  void meet() override {
    for (int from = 0; from < size_; ++from) {
      const auto* table = reinterpret_cast<const Entry*>(letter(from));
      for (int to = 0; to < size_; ++to) rounds_ = std::max(rounds_, rounds_for(table[to].count, each_));
      if (table[me_].count == wanted_[from]) continue;
      throw ShapeMismatch("group " + channel_->name + ": all_to_all: rank " + std::to_string(from) + " sends " +
                          std::to_string(table[me_].count) + " elements to rank " + std::to_string(me_) +
                          ", which expects " + std::to_string(wanted_[from]));
    }
  }
  void stage(uint64_t round) override {
    for (int to = 0; to < size_; ++to) {
      const Range range = round_of(round, each_, counts_[to]);
      if (to != me_)
        deliver(source(me_, round) + bytes(to * each_), in_ + bytes(offsets_[to] + range.begin), bytes(range.count()),
                all_bytes_);
    }
  }
  void take(uint64_t round) override {
    for (int step = 1; step < size_; ++step) {
      const int from = (me_ + step) % size_;
      const Range range = round_of(round, each_, wanted_[from]);
      const auto& entry = reinterpret_cast<const Entry*>(letter(from))[me_];
      deliver(out_ + bytes(out_offsets_[from] + range.begin),
              source(from, round) + (is_whole(from) ? entry.offset + bytes(range.begin) : bytes(me_ * each_)),
              bytes(range.count()), all_bytes_);
    }
  }

  const std::byte* in_;
  std::byte* out_;
  int64_t all_bytes_;
  std::vector<int64_t> counts_, offsets_, wanted_, out_offsets_;
  int64_t each_;
  bool is_small_ = false;
};

class Broadcast : public Collective {
 public:
  Broadcast(std::shared_ptr<ShmChannel> channel, ShmHeading heading, const at::Tensor& tensor, Milliseconds timeout,
            std::function<bool()> is_there)
      : Collective(std::move(channel), heading, tensor, timeout),
        data_(mutable_data_of(tensor)),
        numel_(tensor.numel()),
        each_(elements_of_lane(1)),
        is_there_(std::move(is_there)) {
    keep(tensor);
    rounds_ = rounds_for(numel_, each_);
    if (me_ != heading.root) return;
    if (bytes(numel_) <= channel_->options.letter_bytes) {
      place_ = bring_in_slot(bytes(numel_));
    } else {
      bring(tensor);
    }
  }

 private:
  bool may_post() override { return !is_there_ || is_there_(); }
  void post() override {
    if (place_ != nullptr) copy_bytes(place_, data_, bytes(numel_));
  }
  void stage(uint64_t round) override {
    const Range range = round_of(round, each_, numel_);
    deliver(source(me_, round), data_ + bytes(range.begin), bytes(range.count()), bytes(numel_));
  }
  void take(uint64_t round) override {
    if (me_ == heading_.root) return;
    const Range range = round_of(round, each_, numel_);
    deliver(data_ + bytes(range.begin),
            source(heading_.root, round) + (is_whole(heading_.root) ? bytes(range.begin) : 0), bytes(range.count()),
            bytes(numel_));
  }

  std::byte* data_;
  int64_t numel_, each_;
  std::byte* place_ = nullptr;
  std::function<bool()> is_there_;
};

}  // namespace

ShmWork shm_barrier(std::shared_ptr<ShmChannel> channel, Milliseconds timeout) {
  return std::make_unique<ShmStarted<Barrier>>(std::move(channel), timeout);
}

ShmWork shm_all_reduce(std::shared_ptr<ShmChannel> channel, const at::Tensor& tensor, ReduceOp op,
                       Milliseconds timeout) {
  const auto bytes = static_cast<int64_t>(tensor.nbytes());
  if (bytes * std::max(1, channel->size - 1) <= channel->options.letter_bytes)
    return std::make_unique<ShmStarted<SmallAllReduce>>(std::move(channel), tensor, op, timeout);
  return std::make_unique<ShmStarted<LargeAllReduce>>(std::move(channel), tensor, op, timeout);
}

ShmWork shm_reduce_scatter(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
                           ReduceOp op, Milliseconds timeout) {
  return std::make_unique<ShmStarted<ReduceScatter>>(std::move(channel), output, input, op, timeout);
}

ShmWork shm_all_gather(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
                       std::span<const int64_t> counts, Milliseconds timeout) {
  return std::make_unique<ShmStarted<AllGather>>(std::move(channel), output, input, counts, timeout);
}

ShmWork shm_all_to_all(std::shared_ptr<ShmChannel> channel, const at::Tensor& output, const at::Tensor& input,
                       std::span<const int64_t> receive_counts, std::span<const int64_t> send_counts,
                       Milliseconds timeout) {
  return std::make_unique<ShmStarted<AllToAll>>(std::move(channel), output, input, receive_counts, send_counts,
                                                timeout);
}

ShmWork shm_broadcast(std::shared_ptr<ShmChannel> channel, const at::Tensor& tensor, int root, Milliseconds timeout,
                      std::function<bool()> is_there) {
  ShmHeading call = heading(ShmCall::kBroadcast, tensor);
  call.root = root;
  return std::make_unique<ShmStarted<Broadcast>>(std::move(channel), call, tensor, timeout, std::move(is_there));
}

}  // namespace lockstep
