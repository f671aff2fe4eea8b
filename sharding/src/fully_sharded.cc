#include <algorithm>

#include <ATen/native/Resize.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/variable.h>

#include <lockstep/base/error.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/fully_sharded.h>
#include <lockstep/sharding/parameter_gather.h>

namespace lockstep {
namespace {

constexpr int kMaxAlive = 2;

}  // namespace

struct FullySharded::State {
  enum class Phase { kFreed, kFetching, kWhole };

  State(ProcessGroup& group, ShardedUnit which, Milliseconds timeout)
      : unit(std::move(which)), gather(group, unit.parameters, timeout) {
    int64_t numel = 0;
    std::vector<int64_t> offsets;
    for (const at::Tensor& parameter : unit.parameters) {
      offsets.push_back(numel);
      numel += cache_aligned(parameter.numel());
    }
    const auto options = unit.parameters[0].options().requires_grad(false);
    {
      const nn::MemoryScope memory(nn::MemoryKind::kParameters);
      flat_shard = at::zeros({gather.shard_numel()}, options);
    }
    const nn::MemoryScope memory(nn::MemoryKind::kGathered);
    whole = at::empty({numel}, options);  // views want memory to be made; it is given back below
    bytes = static_cast<int64_t>(whole.nbytes());
    for (size_t i = 0; i < unit.parameters.size(); ++i) {
      shards.push_back(gather.view(flat_shard, i));
      // No view in autograd's sense: saved tensors must not tie the unit's parameters to each other.
      const at::AutoDispatchBelowADInplaceOrView no_view;
      const at::Tensor& parameter = unit.parameters[i];
      views.push_back(whole.narrow(0, offsets[i], parameter.numel()).view(parameter.sizes()));
    }
    resize(0);
  }

  void resize(int64_t to) {
    const nn::MemoryScope memory(nn::MemoryKind::kGathered);
    c10::StorageImpl* storage = whole.storage().unsafeGetStorageImpl();
    if (whole.is_cpu()) return at::native::resize_bytes_cpu(storage, to);
    // What is given back may still be read on the stream; there it is also handed out again.
    storage->set_data_ptr_noswap(to > 0 ? storage->allocator()->allocate(to) : at::DataPtr(nullptr, whole.device()));
    storage->set_nbytes(static_cast<size_t>(to));
  }

  ShardedUnit unit;
  ParameterGather gather;
  at::Tensor flat_shard, whole;
  std::vector<at::Tensor> shards, views;
  int64_t bytes = 0;
  Phase phase = Phase::kFreed;
};

FullySharded::FullySharded(ProcessGroup& group, std::vector<ShardedUnit> units, Milliseconds timeout,
                           metrics::TraceTrack track)
    : group_(group), timeout_(timeout), track_(track) {
  for (auto& unit : units) {
    LOCKSTEP_CHECK(!unit.parameters.empty()) << "unit " << unit.name << " has no parameters";
    units_.push_back(std::make_unique<State>(group, std::move(unit), timeout));
    State& state = *units_.back();
    for (size_t i = 0; i < state.views.size(); ++i) state.unit.parameters[i].set_data(state.views[i]);
    if (!state.unit.stays) order_.push_back(units_.size() - 1);
  }
}

FullySharded::~FullySharded() = default;

const at::Tensor& FullySharded::shard(size_t unit, size_t parameter) const { return units_[unit]->shards[parameter]; }

void FullySharded::start(size_t unit) {
  const metrics::TraceSpan span(track_, "launch parameter gather", "collective", {"unit", static_cast<int64_t>(unit)});
  State& state = *units_[unit];
  state.gather.start_from_shard(state.flat_shard);
  state.phase = State::Phase::kFetching;
  if (!state.unit.stays) max_alive_ = std::max(max_alive_, ++alive_);
}

void FullySharded::require(size_t unit) {
  State& state = *units_[unit];
  if (state.phase == State::Phase::kFreed) start(unit);
  if (state.phase == State::Phase::kFetching) finish(unit);
}

void FullySharded::finish(size_t unit) {
  State& state = *units_[unit];
  const metrics::TraceSpan span(track_, "wait for parameters", "collective", {"unit", static_cast<int64_t>(unit)},
                                {"bytes", state.bytes});
  state.resize(state.bytes);
  state.gather.finish(state.views, /*skip_own=*/false);
  state.phase = State::Phase::kWhole;
}

void FullySharded::free(size_t unit) {
  State& state = *units_[unit];
  if (state.phase == State::Phase::kFreed) return;
  if (state.phase == State::Phase::kFetching) finish(unit);  // nobody came for it
  state.resize(0);
  state.phase = State::Phase::kFreed;
  if (!state.unit.stays) --alive_;
}

// The neighbour in the order of forward, while this unit computes.
void FullySharded::prefetch_beside(size_t unit, int direction) {
  const auto place = std::find(order_.begin(), order_.end(), unit) - order_.begin() + direction;
  if (place < 0 || place >= static_cast<int64_t>(order_.size()) || alive_ >= kMaxAlive) return;
  State& neighbour = *units_[order_[place]];
  if (neighbour.unit.part == units_[unit]->unit.part && neighbour.phase == State::Phase::kFreed) start(order_[place]);
}

void FullySharded::begin(bool both) {
  both_ = both;
  seen_.clear();
  calls_.clear();
  for (size_t unit = 0; unit < units_.size(); ++unit) {
    if (units_[unit]->unit.stays) require(unit);
  }
}

void FullySharded::before_forward(size_t unit) {
  if (units_[unit]->unit.stays) return;
  LOCKSTEP_CHECK(std::find(seen_.begin(), seen_.end(), unit) == seen_.end())
      << "unit " << units_[unit]->unit.name << " is called twice in one forward";
  seen_.push_back(unit);
  require(unit);
  prefetch_beside(unit, +1);
}

void FullySharded::after_forward(size_t unit) {
  const bool needed_at_once = both_ && unit == order_.back();
  if (!units_[unit]->unit.stays && !needed_at_once) free(unit);
}

// Autograd runs what was made later first: units that had their turn are done.
void FullySharded::before_backward(size_t unit) {
  if (units_[unit]->unit.stays) return;
  for (const BackwardCall& call : calls_) {
    if (call.is_before && call.unit != unit) free(call.unit);
  }
  calls_.push_back({unit, /*is_before=*/true, false});
  require(unit);
  prefetch_beside(unit, -1);
}

void FullySharded::after_backward(size_t unit, bool still_read) {
  calls_.push_back({unit, /*is_before=*/false, still_read});
  if (!units_[unit]->unit.stays && !still_read) free(unit);
}

void FullySharded::end() {
  for (size_t unit = 0; unit < units_.size(); ++unit) {
    if (!units_[unit]->unit.stays) free(unit);
  }
  if (seen_.size() == order_.size()) order_ = seen_;
  if (!calls_.empty()) backward_[units_[calls_[0].unit]->unit.part] = std::move(calls_);
}

void FullySharded::absent_forward(size_t part) {
  const std::vector<size_t> order = order_;
  for (const size_t unit : order) {
    if (units_[unit]->unit.part != part) continue;
    before_forward(unit);
    after_forward(unit);
  }
}

void FullySharded::absent_backward(size_t part, const std::function<void(size_t unit)>& on_backward) {
  for (const auto& [unit, is_before, still_read] : backward_[part]) {
    if (is_before) {
      before_backward(unit);
    } else {
      after_backward(unit, still_read);
      on_backward(unit);
    }
  }
}

void FullySharded::end_step() {
  if (is_planted(Plant::kStaleUnit)) return;
  for (size_t unit = 0; unit < units_.size(); ++unit) free(unit);
}

}  // namespace lockstep
