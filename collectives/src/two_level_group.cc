#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/ordered_reduction.h>
#include <lockstep/collectives/shm_group.h>

#include "call_checks.h"
#include "shm_group.h"

namespace lockstep {
namespace {

constexpr uint64_t kTags = 1 << 20;

// What a group and its operations share. Between nodes everything is a send and a receive whose tag was settled when
// the operation was called, and calls within a node are all made then too: in one order on all ranks, however their
// parts end.
struct TwoLevel {
  std::unique_ptr<ProcessGroup> world, across, node_control;  // across: `world` again, for tags of our own
  std::shared_ptr<ShmChannel> whole, node;                    // whole: rank, size and name, no mailboxes
  ShmOptions options;
  std::vector<int> nodes, local;            // by rank: its node, its place among that node's ranks
  std::map<int, std::vector<int>> members;  // by node, ascending
  uint64_t next_tag = 0;

  int rank() const { return whole->rank; }
  int size() const { return whole->size; }
  bool is_near(int rank) const { return nodes[rank] == nodes[whole->rank]; }
  const std::vector<int>& near() const { return members.at(nodes[whole->rank]); }
  // Who on `node` takes what `from`, of another one, has for all there.
  int receiver(int from, int node) const {
    const auto& there = members.at(node);
    return there[local[from] % there.size()];
  }
  int tag() { return static_cast<int>(next_tag++ % kTags); }
};

// Whether each is done, moving all on.
bool poll_all(std::vector<ShmWork>& calls, std::vector<std::shared_ptr<Work>>& letters) {
  bool is_done = true;
  for (auto& call : calls) is_done &= call->poll_alone();
  for (auto& letter : letters) is_done &= letter->poll();
  return is_done;
}

// An all-to-all: pairs of one node by one call there, all others by letters.
class Exchange {
 public:
  Exchange(TwoLevel& group, const at::Tensor& output, const at::Tensor& input, std::span<const int64_t> receive_counts,
           std::span<const int64_t> send_counts, Milliseconds timeout)
      : output_(output.view({-1})), near_(group.near()) {
    const int tag = group.tag(), size = group.size();
    const at::Tensor flat = input.view({-1});
    std::vector<int64_t> from_offsets(size, 0), to_offsets(size, 0);
    std::partial_sum(receive_counts.begin(), receive_counts.end() - 1, from_offsets.begin() + 1);
    std::partial_sum(send_counts.begin(), send_counts.end() - 1, to_offsets.begin() + 1);
    for (int step = 1; step < size; ++step) {
      const int from = (group.rank() - step + size) % size, to = (group.rank() + step) % size;
      if (!group.is_near(from) && receive_counts[from] > 0)
        receive(group, output_.narrow(0, from_offsets[from], receive_counts[from]), from, tag, timeout);
      if (!group.is_near(to) && send_counts[to] > 0)
        send(group, flat.narrow(0, to_offsets[to], send_counts[to]), to, tag, timeout);
    }
    std::vector<int64_t> send_near, receive_near;
    for (const int rank : near_) {
      send_near.push_back(send_counts[rank]);
      receive_near.push_back(receive_counts[rank]);
      in_parts_.push_back(flat.narrow(0, to_offsets[rank], send_counts[rank]));
      out_parts_.push_back(output_.narrow(0, from_offsets[rank], receive_counts[rank]));
    }
    is_in_one_ = near_.back() - near_.front() + 1 == static_cast<int>(near_.size());
    const at::Tensor in = is_in_one_ ? flat.narrow(0, to_offsets[near_.front()], sum(send_near)) : at::cat(in_parts_);
    packed_ = is_in_one_ ? output_.narrow(0, from_offsets[near_.front()], sum(receive_near))
                         : at::empty({sum(receive_near)}, output_.options());
    calls_.push_back(shm_all_to_all(group.node, packed_, in, receive_near, send_near, timeout));
  }

  bool poll() {
    if (!poll_all(calls_, letters_)) return false;
    if (is_in_one_) return true;
    int64_t offset = 0;
    for (at::Tensor& part : out_parts_) {
      part.copy_(packed_.narrow(0, offset, part.numel()));
      offset += part.numel();
    }
    return is_in_one_ = true;  // unpacked once
  }

 private:
  static int64_t sum(const std::vector<int64_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  }
  void receive(TwoLevel& group, const at::Tensor& part, int from, int tag, Milliseconds timeout) {
    letters_.push_back(std::make_shared<Work>(group.across->recv(part, from, tag, timeout)));
  }
  void send(TwoLevel& group, const at::Tensor& part, int to, int tag, Milliseconds timeout) {
    letters_.push_back(std::make_shared<Work>(group.across->send(part, to, tag, timeout)));
  }

  at::Tensor output_, packed_;
  std::vector<int> near_;
  std::vector<at::Tensor> in_parts_, out_parts_;
  bool is_in_one_ = true;  // this node's ranks follow each other, so their parts do
  std::vector<std::shared_ptr<Work>> letters_;
  std::vector<ShmWork> calls_;
};

// Parts of a tensor, each of which one rank has and all are to have: to one rank of each other node by letter, and from
// the one that has it to the others of its node.
class Spread {
 public:
  struct Part {
    int owner;
    Piece piece;
  };

  Spread(TwoLevel& group, const at::Tensor& tensor, const std::vector<Part>& parts, Milliseconds timeout)
      : group_(group), timeout_(timeout), tag_(group.tag()), is_released_(std::make_shared<bool>(false)) {
    const at::Tensor flat = tensor.view({-1});
    for (const auto& [owner, piece] : parts) {
      if (piece.numel == 0) continue;
      const at::Tensor part = flat.narrow(0, piece.offset, piece.numel);
      const int holder = group.is_near(owner) ? owner : group.receiver(owner, group.nodes[group.rank()]);
      std::function<bool()> is_there;
      if (owner == group.rank()) {
        own_.push_back(part);
        is_there = [is_released = is_released_] { return *is_released; };
      } else if (holder == group.rank()) {
        letters_.push_back(std::make_shared<Work>(group.across->recv(part, owner, tag_, timeout)));
        is_there = [letter = letters_.back()] { return letter->poll(); };
      }
      calls_.push_back(shm_broadcast(group.node, part, group.local[holder], timeout, std::move(is_there)));
    }
  }

  // This rank's own part is there.
  void release() {
    for (const at::Tensor& part : own_) {
      for (const auto& [node, there] : group_.members) {
        if (node == group_.nodes[group_.rank()]) continue;
        const int to = group_.receiver(group_.rank(), node);
        letters_.push_back(std::make_shared<Work>(group_.across->send(part, to, tag_, timeout_)));
      }
    }
    *is_released_ = true;
  }

  bool poll() { return poll_all(calls_, letters_) && *is_released_; }

 private:
  TwoLevel& group_;
  Milliseconds timeout_;
  int tag_;
  std::shared_ptr<bool> is_released_;
  std::vector<at::Tensor> own_;
  std::vector<std::shared_ptr<Work>> letters_;
  std::vector<ShmWork> calls_;
};

// An exchange, then arithmetic, then a spread; any of them may be missing.
class Operation : public ShmOperation {
 public:
  Operation(std::shared_ptr<TwoLevel> group, std::string doing, Milliseconds timeout,
            std::unique_ptr<Exchange> exchange, std::function<void()> fold, std::unique_ptr<Spread> spread)
      : ShmOperation(group->whole, timeout),
        group_(std::move(group)),
        doing_(std::move(doing)),
        exchange_(std::move(exchange)),
        fold_(std::move(fold)),
        spread_(std::move(spread)) {}

 private:
  Progress advance() override {
    try {
      return is_through() ? Progress::kDone : Progress::kNone;
    } catch (const CollectiveError& error) {
      throw CollectiveError(channel_->describe(doing_) + " failed: " + error.what());
    }
  }

  bool is_through() {
    if (!is_folded_) {
      if (exchange_ && !exchange_->poll()) return false;
      if (fold_) fold_();
      if (spread_) spread_->release();
      is_folded_ = true;
    }
    return !spread_ || spread_->poll();
  }

  std::string doing() const override { return doing_; }

  std::shared_ptr<TwoLevel> group_;
  std::string doing_;
  bool is_folded_ = false;
  std::unique_ptr<Exchange> exchange_;
  std::function<void()> fold_;
  std::unique_ptr<Spread> spread_;
};

std::string of(const at::Tensor& tensor) {
  return " of " + std::to_string(tensor.numel()) + " " + at::toString(tensor.scalar_type());
}

// rows [p, n] -> out [n], in the canonical tree over the ranks.
std::function<void()> folding(const at::Tensor& rows, const at::Tensor& out, ReduceOp op) {
  return [rows, out, op] {
    std::vector<const std::byte*> terms;
    terms.reserve(rows.size(0));
    for (int64_t rank = 0; rank < rows.size(0); ++rank)
      terms.push_back(static_cast<const std::byte*>(rows.const_data_ptr()) +
                      rank * rows.size(1) * static_cast<int64_t>(rows.element_size()));
    fold(FoldPlan::of_leaves(rows.size(0)), rows.scalar_type(), op, terms,
         static_cast<std::byte*>(out.mutable_data_ptr()), out.numel());
  };
}

class TwoLevelGroup : public ProcessGroup {
 public:
  explicit TwoLevelGroup(std::shared_ptr<TwoLevel> shared) : shared_(std::move(shared)) {
    set_control_timeout(shared_->world->control_timeout());
  }

  int rank() const override { return shared_->rank(); }
  int size() const override { return shared_->size(); }
  const std::string& name() const override { return shared_->whole->name; }
  const char* backend() const override { return "two_level"; }

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    return reduce_everywhere("all_reduce" + of(tensor), tensor, op, timeout);
  }

  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    check_reduce_scatter(*this, output, input);
    const std::vector<int64_t> counts(size(), output.numel());
    const at::Tensor rows = at::empty({size(), output.numel()}, input.options());
    return start(
        "reduce_scatter" + of(input), timeout, [&] { return exchange(rows, input, counts, counts, timeout); },
        folding(rows, output, op), [] { return nullptr; });
  }

  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const std::vector<int64_t> counts(size(), input.numel());
    return all_gather_uneven(output, input, counts, timeout);
  }

  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    check_all_gather(*this, output, input, counts);
    std::vector<Spread::Part> parts;
    int64_t offset = 0;
    for (int rank = 0; rank < size(); ++rank) {
      parts.push_back({rank, {offset, counts[rank]}});
      offset += counts[rank];
    }
    const Piece& own = parts[rank()].piece;
    const at::Tensor place = output.view({-1}).narrow(0, own.offset, own.numel);
    if (place.const_data_ptr() != input.const_data_ptr()) place.copy_(input.view({-1}));
    return start(
        "all_gather" + of(output), timeout, [] { return nullptr; }, {},
        [&] { return std::make_unique<Spread>(*shared_, output, parts, timeout); });
  }

  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    check_all_to_all(*this, output, input, receive_counts, send_counts);
    return start(
        "all_to_all" + of(input), timeout,
        [&] { return exchange(output, input, receive_counts, send_counts, timeout); }, {}, [] { return nullptr; });
  }

  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    const std::vector<Spread::Part> all{{root, {0, tensor.numel()}}};
    return start(
        "broadcast from " + std::to_string(root) + of(tensor), timeout, [] { return nullptr; }, {},
        [&] { return std::make_unique<Spread>(*shared_, tensor, all, timeout); });
  }

  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    const std::string doing = "send to " + std::to_string(to);
    refuse_if_broken(doing);
    return Work(shm_forwarded(shared_->whole, doing, shared_->world->send(tensor, to, tag, timeout), timeout));
  }

  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override {
    const std::string doing = "recv from " + std::to_string(from);
    refuse_if_broken(doing);
    return Work(shm_forwarded(shared_->whole, doing, shared_->world->recv(tensor, from, tag, timeout), timeout));
  }

  // Each rank's byte goes everywhere by way of the others of its node.
  void barrier(Milliseconds timeout) override {
    reduce_everywhere("barrier", at::zeros({int64_t{64} * size()}, at::kByte), ReduceOp::kMax, timeout).wait();
  }

  at::Tensor empty_mapped(int64_t numel, at::TensorOptions options) override {
    return empty_in(*shared_->node->memory, numel, options);
  }

  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override;

  void close() override {
    retire(*shared_->node);
    for (auto* group : {shared_->world.get(), shared_->across.get(), shared_->node_control.get()}) group->close();
  }

  void abort() noexcept override {
    shared_->whole->is_broken = true;
    shared_->node->is_broken = true;
    for (auto* group : {shared_->world.get(), shared_->across.get(), shared_->node_control.get()}) group->abort();
  }

 private:
  void refuse_if_broken(const std::string& doing) const { shared_->whole->refuse_if_broken(doing); }

  std::unique_ptr<Exchange> exchange(const at::Tensor& output, const at::Tensor& input,
                                     std::span<const int64_t> receive_counts, std::span<const int64_t> send_counts,
                                     Milliseconds timeout) {
    return std::make_unique<Exchange>(*shared_, output, input, receive_counts, send_counts, timeout);
  }

  // Parts to their owners, who fold them, and back.
  Work reduce_everywhere(const std::string& doing, const at::Tensor& tensor, ReduceOp op, Milliseconds timeout) {
    const std::vector<Piece> pieces = even_pieces(tensor.numel(), size());
    std::vector<int64_t> send_counts;
    std::vector<Spread::Part> parts;
    for (int rank = 0; rank < size(); ++rank) {
      send_counts.push_back(pieces[rank].numel);
      parts.push_back({rank, pieces[rank]});
    }
    const Piece& own = pieces[rank()];
    const std::vector<int64_t> receive_counts(size(), own.numel);
    const at::Tensor rows = at::empty({size(), own.numel}, tensor.options());
    return start(
        doing, timeout, [&] { return exchange(rows, tensor, receive_counts, send_counts, timeout); },
        folding(rows, tensor.view({-1}).narrow(0, own.offset, own.numel), op),
        [&] { return std::make_unique<Spread>(*shared_, tensor, parts, timeout); });
  }

  template <typename MakeExchange, typename MakeSpread>
  Work start(const std::string& doing, Milliseconds timeout, const MakeExchange& make_exchange,
             std::function<void()> fold, const MakeSpread& make_spread) {
    refuse_if_broken(doing);
    std::unique_ptr<Exchange> exchange = make_exchange();
    std::unique_ptr<Spread> spread = make_spread();
    return Work(std::make_unique<ShmStarted<Operation>>(shared_, doing, timeout, std::move(exchange), std::move(fold),
                                                        std::move(spread)));
  }

  std::shared_ptr<TwoLevel> shared_;
};

// The nodes' memories, or an error on every rank of every node.
std::shared_ptr<ShmMemory> make_memory(ProcessGroup& world, ProcessGroup& node) {
  std::shared_ptr<ShmMemory> memory;
  std::string complaint;
  try {
    memory = ShmMemory::make(node);
  } catch (const ConfigError& error) {
    complaint = error.what();
  }
  for (const std::string& one : all_gather_text(world, complaint)) {
    if (!one.empty()) throw ConfigError(one);
  }
  return memory;
}

// Collective over `world`. @param memory this node's, for all of `world`'s ranks on it; made when there is none yet.
std::unique_ptr<ProcessGroup> make_levels(std::unique_ptr<ProcessGroup> world, std::vector<int> nodes,
                                          std::shared_ptr<ShmMemory> memory, ShmOptions options) {
  auto shared = std::make_shared<TwoLevel>();
  const int me = world->rank();
  shared->local.resize(nodes.size());
  for (size_t rank = 0; rank < nodes.size(); ++rank) {
    auto& there = shared->members[nodes[rank]];
    shared->local[rank] = static_cast<int>(there.size());
    there.push_back(static_cast<int>(rank));
  }
  shared->nodes = std::move(nodes);
  shared->options = options;
  shared->across = world->split(0, me, world->name());
  shared->node_control = world->split(shared->members[shared->nodes[me]].front(), me, world->name());
  if (!memory) memory = make_memory(*world, *shared->node_control);
  shared->node = make_shm_channel(memory, *shared->node_control, options);
  shared->whole = std::make_shared<ShmChannel>();
  shared->whole->memory = std::move(memory);
  shared->whole->name = world->name();
  shared->whole->rank = me;
  shared->whole->size = world->size();
  shared->world = std::move(world);
  return std::make_unique<TwoLevelGroup>(std::move(shared));
}

std::unique_ptr<ProcessGroup> TwoLevelGroup::make_part(int color, int key, const std::string& name) {
  refuse_if_broken("split");
  auto part = shared_->world->split(color, key, name);
  const int mine = shared_->nodes[rank()];
  const std::string all = all_gather_bytes(*part, std::as_bytes(std::span(&mine, 1)));
  std::vector<int> nodes(part->size());
  std::memcpy(nodes.data(), all.data(), all.size());
  std::map<int, int> ranks;
  for (const int node : nodes) ++ranks[node];
  if (ranks.size() == 1) return make_shm_group(std::move(part), shared_->node->memory, shared_->options);
  if (ranks.size() == nodes.size()) return part;
  return make_levels(std::move(part), std::move(nodes), shared_->node->memory, shared_->options);
}

}  // namespace

std::unique_ptr<ProcessGroup> make_two_level_group(std::unique_ptr<ProcessGroup> world, std::vector<int> nodes,
                                                   ShmOptions options) {
  LOCKSTEP_CHECK(nodes.size() == static_cast<size_t>(world->size())) << nodes.size() << " nodes named";
  return make_levels(std::move(world), std::move(nodes), nullptr, options);
}

}  // namespace lockstep
