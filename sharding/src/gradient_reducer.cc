#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <optional>
#include <sstream>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/csrc/autograd/variable.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/gradient_reducer.h>

#include "add.h"

namespace lockstep {
namespace {

constexpr int64_t kAlignment = 16;  // floats: one cache line, so that parameters in a bucket never share one

int64_t aligned(int64_t numel) { return (numel + kAlignment - 1) / kAlignment * kAlignment; }

// What a parameter without gradient contributes: -0.0 is addition's identity for every float, +0.0 would turn -0.0 into
// +0.0.
constexpr float kNothing = -0.0f;

bool is_ours_alone(const at::Tensor& tensor) { return tensor.storage().use_count() == 1; }

// left + right, an undefined one being nothing. Adds into whichever no one else can see.
at::Tensor merged(const at::Tensor& left, const at::Tensor& right) {
  if (!left.defined()) return right;
  if (!right.defined()) return left;
  at::Tensor out = is_ours_alone(left) ? left : is_ours_alone(right) ? right : at::empty(left.sizes(), left.options());
  add_to(out.mutable_data_ptr<float>(), left.const_data_ptr<float>(), right.const_data_ptr<float>(), left.numel());
  return out;
}

}  // namespace

struct GradientReducer::Bucket {
  std::vector<size_t> parameters;
  int64_t numel = 0;
  std::vector<at::Tensor> roots;  // this rank's sums, one flat tensor for each of root_blocks_
  at::Tensor grad;                // the reduced gradient
  std::atomic<int64_t> missing{0};
  std::optional<OrderedReduction> reduction;
  Work work;  // the gather of pieces, or the fast all-reduce
};

// A parameter's place in its bucket, and its gradients that wait for their siblings.
struct GradientReducer::Slot {
  size_t bucket = 0;
  int64_t offset = 0, numel = 0;
  std::mutex mutex;
  std::vector<std::pair<LeafBlock, at::Tensor>> waiting;
  std::atomic<bool> used{false};
};

struct GradientReducer::Lane {
  int64_t leaf = -1;
  std::vector<bool> arrived;
};

struct GradientReducer::LaunchState {
  std::mutex mutex;
  size_t next = 0;  // the first bucket not launched yet
};

// One a parameter and lane. AccumulateGrad has just stored this leaf's gradient: take it, so that the next leaf starts
// undefined.
class GradientHook : public torch::autograd::PostAccumulateGradHook {
 public:
  GradientHook(GradientReducer& reducer, int lane, size_t parameter)
      : reducer_(reducer), lane_(lane), parameter_(parameter) {}
  void operator()(const at::Tensor& parameter) override {
    at::Tensor grad = std::move(parameter.mutable_grad());
    parameter.mutable_grad().reset();
    reducer_.deliver(lane_, parameter_, std::move(grad));
  }

 private:
  GradientReducer& reducer_;
  int lane_;
  size_t parameter_;
};

GradientReducer::GradientReducer(ProcessGroup& group, std::vector<NamedParameter> parameters,
                                 GradientReducerOptions options)
    : group_(group),
      parameters_(std::move(parameters)),
      options_(options),
      share_(leaf_share(options.num_leaves, group.rank(), group.size())),
      root_blocks_(maximal_aligned_blocks(share_)),
      launch_(std::make_unique<LaunchState>()) {
  for (const auto& [name, tensor] : parameters_) {
    LOCKSTEP_CHECK(tensor.is_contiguous() && tensor.scalar_type() == at::kFloat)
        << "parameter " << name << " must be contiguous f32; precision is the step's business, not the parameter's";
  }
  check_parameters_agree();
  build_buckets();
}

GradientReducer::~GradientReducer() = default;

void GradientReducer::check_parameters_agree() {
  std::ostringstream mine;
  for (const auto& [name, tensor] : parameters_) mine << name << ' ' << tensor.sizes() << '\n';
  const uint64_t hash = std::hash<std::string>{}(mine.str());
  const std::string all = all_gather_bytes(group_, std::as_bytes(std::span(&hash, 1)));
  for (int rank = 0; rank < group_.size(); ++rank) {
    uint64_t theirs = 0;
    std::memcpy(&theirs, all.data() + rank * sizeof(theirs), sizeof(theirs));
    if (theirs != hash) {
      throw ConfigError("rank " + std::to_string(rank) + " and rank " + std::to_string(group_.rank()) +
                        " built different models: the names or shapes of their parameters differ. "
                        "Mend: start every rank with the same program and flags.");
    }
  }
}

void GradientReducer::build_buckets() {
  slots_.resize(parameters_.size());
  grads_.resize(parameters_.size());
  for (size_t i = parameters_.size(); i-- > 0;) {
    const int64_t numel = parameters_[i].tensor.numel();
    const int64_t bytes = int64_t{sizeof(float)} * aligned(numel);
    const int64_t limit =
        buckets_.size() <= 1 ? std::min(options_.first_bucket_bytes, options_.bucket_bytes) : options_.bucket_bytes;
    if (buckets_.empty() || buckets_.back()->numel * int64_t{sizeof(float)} + bytes > limit) {
      buckets_.push_back(std::make_unique<Bucket>());
    }
    Bucket& bucket = *buckets_.back();
    slots_[i] = std::make_unique<Slot>();
    slots_[i]->bucket = buckets_.size() - 1;
    slots_[i]->offset = bucket.numel;
    slots_[i]->numel = numel;
    bucket.parameters.push_back(i);
    bucket.numel += aligned(numel);
  }
  const auto device = parameters_.empty() ? at::Device(at::kCPU) : parameters_[0].tensor.device();
  const auto f32 = at::TensorOptions().dtype(at::kFloat).device(device);
  // Alone, the first root becomes the gradient in place; otherwise roots travel and the sum gets a buffer of its own.
  const bool root_is_grad = group_.size() == 1;
  for (auto& bucket : buckets_) {
    for (size_t r = 0; r < root_blocks_.size(); ++r) {
      bucket->roots.push_back(at::full({bucket->numel}, kNothing, f32));
    }
    bucket->grad = root_is_grad ? bucket->roots[0] : at::full({bucket->numel}, kNothing, f32);
    for (size_t i : bucket->parameters) {
      grads_[i] = bucket->grad.narrow(0, slots_[i]->offset, slots_[i]->numel).view(parameters_[i].tensor.sizes());
    }
  }
}

int GradientReducer::attach_lane(const std::vector<at::Tensor>& parameters) {
  LOCKSTEP_CHECK(parameters.size() == parameters_.size())
      << "a lane's model has " << parameters.size() << " parameters, lane 0's has " << parameters_.size();
  const int lane = static_cast<int>(lanes_.size());
  lanes_.push_back(std::make_unique<Lane>());
  lanes_.back()->arrived.resize(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    torch::autograd::impl::set_post_acc_grad_hooks(parameters[i], std::make_unique<GradientHook>(*this, lane, i));
  }
  return lane;
}

void GradientReducer::begin_step() {
  launch_->next = 0;
  for (auto& bucket : buckets_) {
    bucket->missing = static_cast<int64_t>(bucket->parameters.size() * root_blocks_.size());
    bucket->reduction.reset();
    bucket->work = Work();
  }
  for (auto& slot : slots_) {
    slot->used = false;
    slot->waiting.clear();  // of a step that was given up
  }
}

void GradientReducer::begin_leaf(int lane, int64_t leaf) {
  LOCKSTEP_CHECK(leaf >= share_.begin && leaf < share_.end)
      << "leaf " << leaf << " is not in this rank's share [" << share_.begin << ", " << share_.end << ")";
  lanes_[lane]->leaf = leaf;
  lanes_[lane]->arrived.assign(parameters_.size(), false);
}

void GradientReducer::end_leaf(int lane) {
  for (size_t i = parameters_.size(); i-- > 0;) {
    if (!lanes_[lane]->arrived[i]) deliver(lane, i, at::Tensor());
  }
  lanes_[lane]->leaf = -1;
}

void GradientReducer::deliver(int lane_number, size_t parameter, at::Tensor grad) {
  Lane& lane = *lanes_[lane_number];
  Slot& slot = *slots_[parameter];
  const std::string& name = parameters_[parameter].name;
  LOCKSTEP_CHECK(lane.leaf >= 0) << "gradient of " << name << " arrived outside begin_leaf .. end_leaf";
  LOCKSTEP_CHECK(!lane.arrived[parameter]) << name << " got two gradients in one backward";
  lane.arrived[parameter] = true;
  if (grad.defined()) {
    LOCKSTEP_CHECK(grad.layout() == at::kStrided && grad.scalar_type() == at::kFloat)
        << "gradient of " << name << " is " << grad.toString() << "; dense f32 is needed";
    grad = grad.contiguous();
    slot.used.store(true, std::memory_order_relaxed);
  }
  const LeafBlock root = root_of(lane.leaf, share_);
  const size_t root_index = std::find(root_blocks_.begin(), root_blocks_.end(), root) - root_blocks_.begin();

  at::Tensor other;
  LeafBlock block{lane.leaf, 1};
  std::unique_lock lock(slot.mutex);
  while (block != root) {
    const LeafBlock sibling{block.start ^ block.size, block.size};
    const auto found = std::find_if(slot.waiting.begin(), slot.waiting.end(),
                                    [&](const auto& entry) { return entry.first == sibling; });
    if (found == slot.waiting.end()) {
      slot.waiting.emplace_back(block, std::move(grad));
      return;
    }
    other = std::move(found->second);
    slot.waiting.erase(found);
    block = {std::min(block.start, sibling.start), 2 * block.size};
    if (block == root) break;  // the last sum goes straight into the bucket
    grad = merged(other, grad);
    other.reset();
  }
  lock.unlock();
  complete_root(parameter, root_index, grad, other);
  launch_ready_buckets(slot.bucket);
}

void GradientReducer::complete_root(size_t parameter, size_t root, const at::Tensor& left, const at::Tensor& right) {
  const Slot& slot = *slots_[parameter];
  Bucket& bucket = *buckets_[slot.bucket];
  float* out = bucket.roots[root].mutable_data_ptr<float>() + slot.offset;
  if (left.defined() && right.defined()) {
    add_to(out, left.const_data_ptr<float>(), right.const_data_ptr<float>(), slot.numel);
  } else if (left.defined() || right.defined()) {
    std::memcpy(out, (left.defined() ? left : right).const_data_ptr<float>(), slot.numel * sizeof(float));
  } else {
    std::fill_n(out, slot.numel, kNothing);
  }
  bucket.missing.fetch_sub(1, std::memory_order_acq_rel);
}

void GradientReducer::launch_ready_buckets(size_t bucket_number) {
  if (buckets_[bucket_number]->missing.load(std::memory_order_acquire) > 0 || group_.size() == 1) return;
  const std::lock_guard lock(launch_->mutex);  // collective calls: one thread at a time, in one order on every rank
  while (launch_->next < buckets_.size() && buckets_[launch_->next]->missing.load(std::memory_order_acquire) == 0) {
    if (launch_->next > 0) {
      auto& before = *buckets_[launch_->next - 1];
      if (before.reduction) before.reduction->poll();  // moves bytes while we are here
    }
    reduce_bucket(*buckets_[launch_->next]);
    ++launch_->next;
  }
}

void GradientReducer::reduce_bucket(Bucket& bucket) {
  if (options_.reduction == Reduction::kOrdered) {
    bucket.reduction.emplace(group_, options_.num_leaves, bucket.roots, bucket.numel, bucket.grad.options(),
                             options_.timeout);
    return;
  }
  float* sum = bucket.grad.mutable_data_ptr<float>();
  if (bucket.roots.empty()) std::fill_n(sum, bucket.numel, kNothing);
  for (size_t r = 0; r < bucket.roots.size(); ++r) {
    const float* root = bucket.roots[r].const_data_ptr<float>();
    if (r == 0) {
      std::memcpy(sum, root, bucket.numel * sizeof(float));
    } else {
      add_into(sum, root, bucket.numel);
    }
  }
  bucket.work = group_.all_reduce(bucket.grad, ReduceOp::kSum, options_.timeout);
}

ExactSum GradientReducer::reduce() {
  if (share_.count() == 0) launch_ready_buckets(0);  // a rank without leaves still owns pieces
  ExactSum squares;
  for (auto& bucket : buckets_) {
    LOCKSTEP_CHECK(bucket->missing == 0) << "the bucket of " << parameters_[bucket->parameters[0]].name << " misses "
                                         << bucket->missing << " gradients: not every leaf of the share was computed";
    at::Tensor piece = bucket->grad;
    if (group_.size() == 1) {
      fold_roots(root_blocks_, bucket->roots);  // in place: roots[0] is the gradient
    } else {
      const Piece own = owned_piece(bucket->numel, group_.rank(), group_.size());
      piece = bucket->grad.narrow(0, own.offset, own.numel);
      if (bucket->reduction) {
        bucket->reduction->finish(piece);
        bucket->reduction.reset();
      } else {
        bucket->work.wait();
      }
    }
    squares.add_squares({piece.const_data_ptr<float>(), static_cast<size_t>(piece.numel())});
  }
  if (group_.size() > 1 && options_.reduction == Reduction::kOrdered) gather_pieces();
  if (first_step_) check_all_used();
  first_step_ = false;
  return squares;
}

void GradientReducer::gather_pieces() {
  std::vector<int64_t> counts(group_.size());
  for (auto& bucket : buckets_) {
    for (int rank = 0; rank < group_.size(); ++rank) {
      counts[rank] = owned_piece(bucket->numel, rank, group_.size()).numel;
    }
    const Piece own = owned_piece(bucket->numel, group_.rank(), group_.size());
    at::Tensor piece = bucket->grad.narrow(0, own.offset, own.numel);
    bucket->work = group_.all_gather_uneven(bucket->grad, piece, counts, options_.timeout);
  }
}

void GradientReducer::wait() {
  for (auto& bucket : buckets_) bucket->work.wait();
}

void GradientReducer::check_all_used() {
  std::vector<std::byte> used(parameters_.size());
  for (size_t i = 0; i < used.size(); ++i) used[i] = std::byte{slots_[i]->used.load()};
  const std::string all = all_gather_bytes(group_, used);
  std::string unused;
  for (size_t i = 0; i < used.size(); ++i) {
    bool anywhere = false;
    for (int rank = 0; rank < group_.size(); ++rank) anywhere |= all[rank * used.size() + i] != 0;
    if (!anywhere) unused += (unused.empty() ? "" : ", ") + parameters_[i].name;
  }
  if (!unused.empty()) {
    throw ConfigError("no micro-batch of the first step gave a gradient to: " + unused +
                      ". Mend: use them in the loss, or freeze them with requires_grad_(false).");
  }
}

}  // namespace lockstep
