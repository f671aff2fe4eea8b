#include <algorithm>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <lockstep/base/error.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/sharding/sharded_reducer.h>

#include "add.h"

namespace lockstep {
namespace {

constexpr size_t kMaxFlights = 1;  // one is collected, one travels

}  // namespace

struct ShardedReducer::Bucket {
  Bucket(std::vector<size_t> members, BucketLayout how, size_t unit)
      : parameters(std::move(members)), layout(std::move(how)), unit(unit) {}
  std::vector<size_t> parameters;
  BucketLayout layout;
  size_t unit;
  at::Tensor buffer;  // this round's gradients, from the first to the departure
  int64_t missing = 0;
  std::vector<std::pair<LeafBlock, at::Tensor>> counter;  // sums of blocks of this rank's piece, left to right
  at::Tensor piece, shard;
  Work work;  // the gather over replicas
};

// A bucket's gradients on their way.
struct ShardedReducer::Flight {
  size_t bucket;
  int64_t round;
  at::Tensor buffer, received;
  Work work;
};

ShardedReducer::ShardedReducer(ProcessGroup& group, std::vector<NamedParameter> parameters,
                               ShardedReducerOptions options)
    : GradientSync(group, std::move(parameters)), options_(std::move(options)), places_(parameters_.size()) {
  LOCKSTEP_CHECK(options_.num_shards > 0 && group.size() % options_.num_shards == 0)
      << group.size() << " ranks cannot form replicas of " << options_.num_shards << " shards";
  LOCKSTEP_CHECK(options_.num_leaves >= group.size())
      << options_.num_leaves << " micro-batches for " << group.size() << " ranks: in the first round each has one";
  if (options_.num_shards > 1 && num_replicas() > 1)
    split_replicas_ = group.split(shard(), group.rank(), group.name() + ".replicate");
  LOCKSTEP_CHECK(options_.parts.empty() || options_.parts.size() == options_.units.size())
      << options_.parts.size() << " parts told for " << options_.units.size() << " units";
  build_buckets();
}

// From the last unit to the first, each in reverse order of registration, each kind of parameter with its own.
void ShardedReducer::build_buckets() {
  for (size_t unit = options_.units.size(); unit-- > 0;) {
    if (part_of(unit) >= parts_.size()) parts_.resize(part_of(unit) + 1);
    std::vector<std::vector<size_t>> groups;
    const auto& members = options_.units[unit];
    for (size_t k = members.size(); k-- > 0;) {
      if (groups.empty() || !may_share_bucket(groups.back().back(), members[k])) groups.emplace_back();
      groups.back().push_back(members[k]);
    }
    for (auto& group : groups) {
      parts_[part_of(unit)].buckets.push_back(buckets_.size());
      allocate(std::move(group), unit);
    }
  }
}

void ShardedReducer::allocate(std::vector<size_t> members, size_t unit) {
  for (size_t k = 0; k < members.size(); ++k) places_[members[k]] = {buckets_.size(), k};
  const auto f32 = parameters_[members[0]].tensor.options().requires_grad(false);
  BucketLayout layout(shapes_of(members), options_.num_shards, num_replicas());
  buckets_.push_back(std::make_unique<Bucket>(std::move(members), std::move(layout), unit));
  Bucket& bucket = *buckets_.back();
  const nn::MemoryScope memory(nn::MemoryKind::kGradients);
  bucket.shard = at::full({bucket.layout.shard_numel(shard())}, kNothing, f32);
  const Piece own = bucket.layout.pieces_of_shard(shard())[group_.rank() / options_.num_shards];
  bucket.piece = bucket.shard.narrow(0, own.offset, own.numel);
  for (size_t k = 0; k < bucket.parameters.size(); ++k) {
    const size_t i = bucket.parameters[k];
    if (parameters_[i].first_use < 0) grads_[i] = bucket.layout.view(bucket.shard, k, shard());
  }
}

ShardedReducer::~ShardedReducer() = default;

std::vector<int64_t> ShardedReducer::leaves() const {
  std::vector<int64_t> leaves;
  for (int64_t leaf = group_.rank(); leaf < options_.num_leaves; leaf += group_.size()) leaves.push_back(leaf);
  return leaves;
}

int64_t ShardedReducer::num_rounds() const { return (options_.num_leaves + group_.size() - 1) / group_.size(); }

int ShardedReducer::participants(int64_t round) const {
  return static_cast<int>(std::min<int64_t>(group_.size(), options_.num_leaves - round * group_.size()));
}

void ShardedReducer::begin_step() {
  flights_.clear();
  for (auto& bucket : buckets_) {
    bucket->counter.clear();
    bucket->buffer.reset();
    bucket->work = Work();
  }
  unit_missing_.resize(options_.units.size());
  for (Part& part : parts_) {
    part.round = 0;
    begin_round(part);
  }
}

void ShardedReducer::begin_round(Part& part) {
  part.next = 0;
  for (const size_t number : part.buckets) {
    Bucket& bucket = *buckets_[number];
    bucket.missing = static_cast<int64_t>(bucket.parameters.size());
    unit_missing_[bucket.unit] = static_cast<int64_t>(options_.units[bucket.unit].size());
  }
}

void ShardedReducer::deliver(int64_t leaf, size_t parameter, at::Tensor grad) {
  const auto [number, place] = places_[parameter];
  Bucket& bucket = *buckets_[number];
  Part& part = parts_[part_of(bucket.unit)];
  LOCKSTEP_CHECK(leaf / group_.size() == part.round)
      << "leaf " << leaf << " in round " << part.round << ": leaves ascend";
  if (!bucket.buffer.defined()) {
    const nn::MemoryScope memory(nn::MemoryKind::kBuckets);
    bucket.buffer = at::empty({bucket.layout.numel()}, bucket.piece.options());
    for (const auto& [offset, numel] : bucket.layout.padding()) fill_nothing(bucket.buffer, offset, numel);
  }
  for (const auto& [in_parameter, in_bucket, numel] : bucket.layout.segments(place)) {
    if (grad.defined()) {
      copy_run(bucket.buffer, in_bucket, grad, in_parameter, numel);
    } else {
      fill_nothing(bucket.buffer, in_bucket, numel);
    }
  }
  grad.reset();
  if (--unit_missing_[bucket.unit] == 0) options_.on_unit_done(bucket.unit);
  if (--bucket.missing == 0) launch_ready_buckets(part);
}

void ShardedReducer::launch_ready_buckets(Part& part) {  // in one order on every rank
  for (; part.next < part.buckets.size() && buckets_[part.buckets[part.next]]->missing == 0; ++part.next)
    launch(part.buckets[part.next], part.round);
}

metrics::TraceSpan ShardedReducer::span(const char* name, size_t bucket) const {
  const auto number = static_cast<int64_t>(bucket);
  return {options_.track, name, "collective", {"bucket", number}, {"bytes", buckets_[bucket]->layout.numel() * 4}};
}

flight::LabelScope ShardedReducer::label_of(size_t bucket) const {
  return {static_cast<int32_t>(bucket), parameters_[buckets_[bucket]->parameters[0]].name};
}

void ShardedReducer::launch(size_t number, int64_t round) {
  Bucket& bucket = *buckets_[number];
  while (flights_.size() >= kMaxFlights) land();
  const auto launch = span("launch reduction", number);
  const flight::LabelScope label = label_of(number);
  const auto& pieces = bucket.layout.pieces();
  const int have = participants(round), rank = group_.rank();
  const bool has_leaf = rank < have;
  std::vector<int64_t> send_counts(group_.size(), 0), receive_counts(group_.size(), 0);
  for (int peer = 0; peer < group_.size(); ++peer) {
    if (has_leaf) send_counts[peer] = pieces[peer].numel;
    if (peer < have) receive_counts[peer] = pieces[rank].numel;
  }
  Flight flight{number, round, std::exchange(bucket.buffer, at::Tensor()), {}, {}};
  if (!has_leaf) flight.buffer = at::empty({0}, bucket.piece.options());
  const nn::MemoryScope memory(nn::MemoryKind::kScratch);
  flight.received = at::empty({have * pieces[rank].numel}, bucket.piece.options());
  flight.work = group_.all_to_all(flight.received, flight.buffer, receive_counts, send_counts, options_.timeout);
  flights_.push_back(std::move(flight));
}

void ShardedReducer::land() {
  Flight flight = std::move(flights_.front());
  flights_.pop_front();
  {
    const auto wait = span("wait for reduction", flight.bucket);
    flight.work.wait();
  }
  flight.buffer.reset();
  push_round(*buckets_[flight.bucket], flight.round, flight.received);
}

// Pushes the round's leaves, which came in order of their ranks, into the counter: equal neighbours merge, left +=
// right. What is left is copied out of the round's memory, unless it is the last: then it is folded at once.
void ShardedReducer::push_round(Bucket& bucket, int64_t round, const at::Tensor& received) {
  const int64_t own = bucket.piece.numel(), first = round * group_.size();
  auto& counter = bucket.counter;
  const auto merge_last_two = [&] {
    const auto [block, right] = std::move(counter.back());
    counter.pop_back();
    add_into(counter.back().second, right);
    counter.back().first.size += block.size;
  };
  for (int64_t k = 0; k < participants(round); ++k) {
    counter.push_back({{first + k, 1}, received.narrow(0, k * own, own)});
    if (is_planted(Plant::kDroppedContribution) && k > 0 && k + 1 == participants(round)) counter.back().second.zero_();
    while (counter.size() > 1) {
      const LeafBlock &left = counter[counter.size() - 2].first, &right = counter.back().first;
      if (left.size != right.size || left.start % (2 * left.size) != 0) break;
      merge_last_two();
    }
  }
  if (round + 1 == num_rounds()) {
    while (counter.size() > 1) merge_last_two();
    bucket.piece.copy_(counter[0].second);
    counter.clear();
    return;
  }
  const nn::MemoryScope memory(nn::MemoryKind::kGradients);
  for (auto& [block, sum] : counter) {
    if (sum.is_alias_of(received)) sum = sum.clone();
  }
}

void ShardedReducer::end_leaf(int lane) {
  GradientSync::end_leaf(lane);
  absent_leaf(static_cast<size_t>(lane));
}

void ShardedReducer::absent_unit(size_t unit) {
  Part& part = parts_[part_of(unit)];
  LOCKSTEP_CHECK(group_.rank() >= participants(part.round)) << "round " << part.round << " has a leaf for this rank";
  for (const size_t number : part.buckets) {
    if (buckets_[number]->unit == unit) buckets_[number]->missing = 0;
  }
  launch_ready_buckets(part);
}

// The end of a round: with a leaf, every bucket has left already.
void ShardedReducer::absent_leaf(size_t number) {
  if (number >= parts_.size()) return;  // a part without parameters
  Part& part = parts_[number];
  if (is_planted(Plant::kAbsentFromExchange)) part.next = part.buckets.size();
  while (part.next < part.buckets.size()) absent_unit(buckets_[part.buckets[part.next]]->unit);
  ++part.round;
  begin_round(part);
}

void ShardedReducer::fold() {
  for (const Part& part : parts_) {
    LOCKSTEP_CHECK(part.buckets.empty() || part.round == num_rounds())
        << part.round << " of " << num_rounds() << " rounds: not every micro-batch of this rank was computed";
  }
  while (!flights_.empty()) land();
  if (first_step_) check_all_used();
  first_step_ = false;
}

at::Tensor ShardedReducer::piece_of(size_t i) const { return buckets_[places_[i].first]->piece; }

std::vector<at::Tensor> ShardedReducer::pieces(int partial_kind) const {
  std::vector<at::Tensor> pieces;
  for (const auto& bucket : buckets_) {
    if (partial_kind == kAll || parameters_[bucket->parameters[0]].partial_kind == partial_kind)
      pieces.push_back(bucket->piece);
  }
  return pieces;
}

ExactSum ShardedReducer::publish() {
  for (size_t i = 0; i < parameters_.size(); ++i) {  // second uses join the first, in forward order
    if (parameters_[i].first_use < 0) continue;
    add_into(piece_of(parameters_[i].first_use), piece_of(i));
  }
  std::vector<at::Tensor> counted;
  for (size_t number = 0; number < buckets_.size(); ++number) {
    Bucket* bucket = buckets_[number].get();
    const NamedParameter& parameter = parameters_[bucket->parameters[0]];
    if (parameter.first_use >= 0) continue;
    if (parameter.is_counted) counted.push_back(bucket->piece);
    if (num_replicas() == 1) continue;
    const auto launch = span("launch gradient gather", number);
    const flight::LabelScope label = label_of(number);
    std::vector<int64_t> counts;
    for (const Piece& piece : bucket->layout.pieces_of_shard(shard())) counts.push_back(piece.numel);
    ProcessGroup& replicas = split_replicas_ ? *split_replicas_ : group_;
    bucket->work = replicas.all_gather_uneven(bucket->shard, bucket->piece, counts, options_.timeout);
  }
  return squares_of(counted);
}

void ShardedReducer::wait() {
  if (num_replicas() == 1) return;
  for (size_t number = 0; number < buckets_.size(); ++number) {
    const auto wait = span("wait for gradient gather", number);
    buckets_[number]->work.wait();
  }
}

}  // namespace lockstep
