#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/gradient_reducer.h>

#include "add.h"

namespace lockstep {
namespace {

bool is_ours_alone(const at::Tensor& tensor) { return tensor.storage().use_count() == 1; }

// left + right, an undefined one being nothing. Adds into whichever no one else can see.
at::Tensor merged(const at::Tensor& left, const at::Tensor& right) {
  if (!left.defined()) return right;
  if (!right.defined()) return left;
  at::Tensor out = is_ours_alone(left) ? left : is_ours_alone(right) ? right : at::empty(left.sizes(), left.options());
  add_to(out, left, right);
  return out;
}

}  // namespace

struct GradientReducer::Bucket {
  Bucket(size_t number, std::vector<size_t> members, BucketLayout how)
      : number(static_cast<int64_t>(number)), parameters(std::move(members)), layout(std::move(how)) {}
  int64_t number;
  std::vector<size_t> parameters;
  BucketLayout layout;
  std::vector<at::Tensor> roots;  // this rank's sums, one flat tensor for each of root_blocks_
  at::Tensor piece, shard;        // this rank's piece of the sum, and the shard it is a part of
  std::atomic<int64_t> missing{0};
  std::optional<OrderedReduction> reduction;
  Work work;            // the gather of pieces, or the fast all-reduce
  at::Tensor fast_sum;  // what the all-reduce works on
  // Of a tied weight's first use: whose root's memory this one's takes over.
  const Bucket* lender = nullptr;
  bool has_lenders_root = false;
};

// A parameter's place, and its gradients that wait for their siblings.
struct GradientReducer::Slot {
  size_t bucket = 0, in_bucket = 0;
  std::mutex mutex;
  std::vector<std::pair<LeafBlock, at::Tensor>> waiting;
};

struct GradientReducer::LaunchState {
  std::mutex mutex;
  size_t next = 0;  // the first bucket not launched yet
};

GradientReducer::GradientReducer(ProcessGroup& group, std::vector<NamedParameter> parameters,
                                 GradientReducerOptions options)
    : GradientSync(group, std::move(parameters)),
      options_(options),
      share_(leaf_share(options.num_leaves, group.rank(), group.size())),
      root_blocks_(maximal_aligned_blocks(share_)),
      launch_(std::make_unique<LaunchState>()) {
  LOCKSTEP_CHECK(options_.num_shards > 0 && group.size() % options_.num_shards == 0)
      << group.size() << " ranks cannot form replicas of " << options_.num_shards << " shards";
  if (options_.num_shards > 1 && num_replicas() > 1)
    split_replicas_ = group.split(shard(), group.rank(), group.name() + ".replicate");
  build_buckets();
}

GradientReducer::~GradientReducer() = default;

std::vector<int64_t> GradientReducer::leaves() const {
  std::vector<int64_t> leaves;
  for (int64_t leaf = share_.begin; leaf < share_.end; ++leaf) leaves.push_back(leaf);
  return leaves;
}

// Neighbours in reverse order of registration share a bucket up to the limit, each kind of parameter with its own; a
// tied weight's uses have one each, cut alike, so that an element's owner has it of every use.
void GradientReducer::build_buckets() {
  std::vector<std::vector<size_t>> groups;
  int64_t bytes = 0;
  for (size_t i = parameters_.size(); i-- > 0;) {
    const auto more = static_cast<int64_t>(parameters_[i].tensor.nbytes());
    const int64_t limit =
        groups.size() <= 1 ? std::min(options_.first_bucket_bytes, options_.bucket_bytes) : options_.bucket_bytes;
    if (groups.empty() || !may_share_bucket(groups.back().back(), i) || bytes + more > limit) {
      groups.emplace_back();
      bytes = 0;
    }
    groups.back().push_back(i);
    bytes += more;
  }
  slots_.resize(parameters_.size());
  for (auto& members : groups) {
    for (size_t k = 0; k < members.size(); ++k) {
      slots_[members[k]] = std::make_unique<Slot>();
      slots_[members[k]]->bucket = buckets_.size();
      slots_[members[k]]->in_bucket = k;
    }
    BucketLayout layout(shapes_of(members), options_.num_shards, num_replicas());
    buckets_.push_back(std::make_unique<Bucket>(buckets_.size(), std::move(members), std::move(layout)));
    allocate(*buckets_.back());
  }
}

// The second use of a tied weight whose memory its first use takes over: its root leaves at the start of the last
// backward, the other one's is complete at the end. Several roots of one use are complete too early for that, and all
// ranks must do alike.
std::optional<size_t> GradientReducer::lender_to(size_t first_use) const {
  if (group_.size() == 1 || options_.reduction != Reduction::kOrdered) return {};
  for (int rank = 0; rank < group_.size(); ++rank) {
    if (maximal_aligned_blocks(leaf_share(options_.num_leaves, rank, group_.size())).size() != 1) return {};
  }
  for (size_t i = parameters_.size(); i-- > first_use + 1;) {
    if (parameters_[i].first_use == static_cast<int64_t>(first_use)) return i;
  }
  return {};
}

void GradientReducer::allocate(Bucket& bucket) {
  const nn::MemoryScope memory(nn::MemoryKind::kGradients);
  const BucketLayout& layout = bucket.layout;
  const auto options = parameters_[bucket.parameters[0]].tensor.options().requires_grad(false);
  const size_t parameter = bucket.parameters[0];
  if (const auto lender = lender_to(parameter)) {
    bucket.lender = buckets_[slots_[*lender]->bucket].get();
    bucket.roots = bucket.lender->roots;
    bucket.has_lenders_root = true;
  }
  while (bucket.roots.size() < std::max<size_t>(1, root_blocks_.size()))
    bucket.roots.push_back(group_.empty_mapped(layout.numel(), options).fill_(kNothing));
  // The sum takes the place of the first root, once that has travelled.
  const at::Tensor home = bucket.roots[0];
  if (root_blocks_.empty()) bucket.roots.clear();
  const Piece own = layout.pieces()[group_.rank()];
  if (parameters_[parameter].first_use >= 0 && lender_to(parameters_[parameter].first_use) == parameter) {
    bucket.piece = at::full({own.numel}, kNothing, options);
    return;
  }
  bucket.piece = home.narrow(0, own.offset, own.numel);
  bucket.shard = options_.num_shards == 1 ? home
                 : num_replicas() == 1    ? bucket.piece
                                          : group_.empty_mapped(layout.shard_numel(shard()), options).fill_(kNothing);
  for (size_t k = 0; k < bucket.parameters.size(); ++k) {
    const size_t i = bucket.parameters[k];
    if (parameters_[i].first_use < 0) grads_[i] = layout.view(bucket.shard, k, shard());
  }
}

void GradientReducer::begin_step() {
  launch_->next = 0;
  for (auto& bucket : buckets_) {
    bucket->missing = static_cast<int64_t>(bucket->parameters.size() * root_blocks_.size());
    bucket->reduction.reset();
    bucket->work = Work();
  }
  for (auto& slot : slots_) slot->waiting.clear();  // of a step that was given up
}

void GradientReducer::deliver(int64_t leaf, size_t parameter, at::Tensor grad) {
  Slot& slot = *slots_[parameter];
  const LeafBlock root = root_of(leaf, share_);
  const size_t root_index = std::find(root_blocks_.begin(), root_blocks_.end(), root) - root_blocks_.begin();

  at::Tensor other;
  LeafBlock block{leaf, 1};
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
  if (bucket.has_lenders_root) take_over_root(bucket);
  const at::Tensor &one = left.defined() ? left : right, &two = left.defined() ? right : left;
  const at::Tensor& out = bucket.roots[root];
  for (const auto& [in_parameter, in_bucket, numel] : bucket.layout.segments(slot.in_bucket)) {
    if (two.defined()) {
      add_run(out, in_bucket, one, two, in_parameter, numel);
    } else if (one.defined()) {
      copy_run(out, in_bucket, one, in_parameter, numel);
    } else {
      fill_nothing(out, in_bucket, numel);
    }
  }
  bucket.missing.fetch_sub(1, std::memory_order_acq_rel);
}

// The lender's root has left, unless some bucket before this one is not full yet, as where a micro-batch uses other
// parameters than usual: from then on each has memory of its own.
void GradientReducer::take_over_root(Bucket& bucket) {
  const std::lock_guard lock(launch_->mutex);
  if (launch_->next == static_cast<size_t>(bucket.number)) return finish_before(bucket);
  const nn::MemoryScope memory(nn::MemoryKind::kGradients);
  bucket.roots[0] = group_.empty_mapped(bucket.layout.numel(), bucket.piece.options()).fill_(kNothing);
  bucket.has_lenders_root = false;
}

// Right before this bucket is launched, on every rank, whether it has the lender's root or not: ranks wait for each
// other in finish().
void GradientReducer::finish_before(const Bucket& bucket) {
  for (int64_t number = 0; number <= bucket.lender->number; ++number) finish_ordered(*buckets_[number]);
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

metrics::TraceSpan GradientReducer::span(const char* name, const Bucket& bucket) const {
  return {options_.track, name, "collective", {"bucket", bucket.number}, {"bytes", bucket.layout.numel() * 4}};
}

flight::LabelScope GradientReducer::label_of(const Bucket& bucket) const {
  return {static_cast<int32_t>(bucket.number), parameters_[bucket.parameters[0]].name};
}

void GradientReducer::reduce_bucket(Bucket& bucket) {
  if (bucket.lender) finish_before(bucket);
  const nn::MemoryScope memory(nn::MemoryKind::kScratch);
  const auto launch = span("launch reduction", bucket);
  const flight::LabelScope label = label_of(bucket);
  if (options_.reduction == Reduction::kOrdered) {
    bucket.reduction.emplace(group_, options_.num_leaves, bucket.roots, bucket.layout.pieces(), bucket.piece.options(),
                             options_.timeout);
    return;
  }
  at::Tensor sum =
      bucket.roots.empty() ? at::full({bucket.layout.numel()}, kNothing, bucket.piece.options()) : bucket.roots[0];
  for (size_t r = 1; r < bucket.roots.size(); ++r) add_into(sum, bucket.roots[r]);
  bucket.fast_sum = sum;
  bucket.work = group_.all_reduce(sum, ReduceOp::kSum, options_.timeout);
}

void GradientReducer::fold() {
  if (share_.count() == 0) launch_ready_buckets(0);  // a rank without leaves still owns pieces
  for (auto& bucket : buckets_) {
    LOCKSTEP_CHECK(bucket->missing == 0) << "the bucket of " << parameters_[bucket->parameters[0]].name << " misses "
                                         << bucket->missing << " gradients: not every leaf of the share was computed";
    if (group_.size() == 1) {
      fold_roots(root_blocks_, bucket->roots);  // in place: roots[0] is the gradient
    } else if (options_.reduction == Reduction::kOrdered) {
      finish_ordered(*bucket);
    } else {
      const auto wait = span("wait for reduction", *bucket);
      bucket->work.wait();
      const Piece own = bucket->layout.pieces()[group_.rank()];
      const at::Tensor sum = std::exchange(bucket->fast_sum, at::Tensor()).narrow(0, own.offset, own.numel);
      if (sum.const_data_ptr() != bucket->piece.const_data_ptr()) bucket->piece.copy_(sum);
    }
  }
  if (first_step_) check_all_used();
  first_step_ = false;
}

void GradientReducer::finish_ordered(Bucket& bucket) {
  if (!bucket.reduction) return;
  const auto wait = span("wait for reduction", bucket);
  const flight::LabelScope label = label_of(bucket);
  bucket.reduction->finish(bucket.piece);
  bucket.reduction.reset();
}

at::Tensor GradientReducer::piece_of(size_t i) const {
  LOCKSTEP_CHECK(stands_alone(i)) << parameters_[i].name << " shares its bucket with others";
  return buckets_[slots_[i]->bucket]->piece;
}

std::vector<at::Tensor> GradientReducer::pieces(int partial_kind) const {
  std::vector<at::Tensor> pieces;
  for (const auto& bucket : buckets_) {
    if (partial_kind == kAll || parameters_[bucket->parameters[0]].partial_kind == partial_kind)
      pieces.push_back(bucket->piece);
  }
  return pieces;
}

ExactSum GradientReducer::publish() {
  for (size_t i = 0; i < parameters_.size(); ++i) {  // second uses join the first, in forward order
    if (parameters_[i].first_use < 0) continue;
    add_into(piece_of(parameters_[i].first_use), piece_of(i));
  }
  std::vector<at::Tensor> counted;
  for (auto& bucket : buckets_) {
    const NamedParameter& parameter = parameters_[bucket->parameters[0]];
    if (parameter.first_use >= 0) continue;
    if (parameter.is_counted) counted.push_back(bucket->piece);
    if (wants_gather(*bucket)) gather(*bucket);
  }
  return squares_of(counted);
}

// After an all-reduce every rank has all of it already, but for what was added since.
bool GradientReducer::wants_gather(const Bucket& bucket) const {
  const bool has_all =
      options_.reduction == Reduction::kFast && options_.num_shards == 1 && !options_.has_terms_beyond_group;
  return num_replicas() > 1 && !(has_all && !stands_alone(bucket.parameters[0]));
}

void GradientReducer::gather(Bucket& bucket) {
  const auto launch = span("launch gradient gather", bucket);
  const flight::LabelScope label = label_of(bucket);
  std::vector<int64_t> counts;
  for (const Piece& piece : bucket.layout.pieces_of_shard(shard())) counts.push_back(piece.numel);
  ProcessGroup& replicas = split_replicas_ ? *split_replicas_ : group_;
  bucket.work = replicas.all_gather_uneven(bucket.shard, bucket.piece, counts, options_.timeout);
}

void GradientReducer::wait() {
  for (auto& bucket : buckets_) {
    if (!wants_gather(*bucket)) continue;
    const auto wait = span("wait for gradient gather", *bucket);
    bucket->work.wait();
  }
}

}  // namespace lockstep
