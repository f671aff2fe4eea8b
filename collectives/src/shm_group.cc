#include "shm_group.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <thread>

#include <sched.h>
#include <unistd.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <lockstep/base/error.h>
#include <lockstep/base/memory_count.h>
#include <lockstep/collectives/shm_group.h>

#include "call_checks.h"

namespace lockstep {
namespace {

// A look at a peer's line takes about 0.1 us, a change of process several: long enough for a peer that is about to
// answer, and none where peers need this core to answer at all.
constexpr int kSpinsWithACoreEach = 2000;

bool has_a_core_each(int ranks) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof(cores), &cores) != 0) return false;
  return ranks <= CPU_COUNT(&cores);
}

template <typename T>
std::vector<T> all_gather_values(ProcessGroup& group, const T& mine) {
  const std::string all = all_gather_bytes(group, std::as_bytes(std::span(&mine, 1)));
  std::vector<T> values(group.size());
  std::memcpy(values.data(), all.data(), all.size());
  return values;
}

class ShmGroup : public ProcessGroup {
 public:
  ShmGroup(std::unique_ptr<ProcessGroup> control, std::shared_ptr<ShmMemory> memory, ShmOptions options)
      : control_(std::move(control)), channel_(make_shm_channel(std::move(memory), *control_, options)) {
    set_control_timeout(control_->control_timeout());
  }

  int rank() const override { return channel_->rank; }
  int size() const override { return channel_->size; }
  const std::string& name() const override { return channel_->name; }
  const char* backend() const override { return "shm"; }

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    channel_->refuse_if_broken("all_reduce");
    return Work(shm_all_reduce(channel_, tensor, op, timeout));
  }

  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    check_reduce_scatter(*this, output, input);
    channel_->refuse_if_broken("reduce_scatter");
    return Work(shm_reduce_scatter(channel_, output, input, op, timeout));
  }

  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const std::vector<int64_t> counts(size(), input.numel());
    return all_gather_uneven(output, input, counts, timeout);
  }

  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    check_all_gather(*this, output, input, counts);
    channel_->refuse_if_broken("all_gather");
    return Work(shm_all_gather(channel_, output, input, counts, timeout));
  }

  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    check_all_to_all(*this, output, input, receive_counts, send_counts);
    channel_->refuse_if_broken("all_to_all");
    return Work(shm_all_to_all(channel_, output, input, receive_counts, send_counts, timeout));
  }

  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    channel_->refuse_if_broken("broadcast");
    return Work(shm_broadcast(channel_, tensor, root, timeout));
  }

  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    return forwarded(
        "send to " + std::to_string(to), [&] { return control_->send(tensor, to, tag, timeout); }, timeout);
  }

  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override {
    return forwarded(
        "recv from " + std::to_string(from), [&] { return control_->recv(tensor, from, tag, timeout); }, timeout);
  }

  void barrier(Milliseconds timeout) override {
    channel_->refuse_if_broken("barrier");
    shm_barrier(channel_, timeout)->wait();
  }

  at::Tensor empty_mapped(int64_t numel, at::TensorOptions options) override {
    return empty_in(*channel_->memory, numel, options);
  }

  std::unique_ptr<Shown> show(const std::vector<at::Tensor>& tensors, Milliseconds timeout) override {
    channel_->refuse_if_broken("show");
    return shm_show(channel_, tensors, timeout);
  }

  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override {
    channel_->refuse_if_broken("split");
    return std::make_unique<ShmGroup>(control_->split(color, key, name), channel_->memory, channel_->options);
  }

  void close() override {
    retire(*channel_);
    control_->close();
  }

  void abort() noexcept override {
    channel_->is_broken = true;
    control_->abort();
  }

 private:
  template <typename Call>
  Work forwarded(const std::string& doing, const Call& call, Milliseconds timeout) {
    channel_->refuse_if_broken(doing);
    return Work(shm_forwarded(channel_, doing, call(), timeout));
  }

  std::unique_ptr<ProcessGroup> control_;
  std::shared_ptr<ShmChannel> channel_;
};

}  // namespace

std::shared_ptr<ShmChannel> make_shm_channel(std::shared_ptr<ShmMemory> memory, ProcessGroup& control,
                                             ShmOptions options) {
  auto channel = std::make_shared<ShmChannel>();
  LOCKSTEP_CHECK(options.letter_bytes <= kShmLetterBytes) << "letters of " << options.letter_bytes << " bytes";
  channel->options = options;
  channel->name = control.name();
  channel->rank = control.rank();
  channel->size = control.size();
  channel->mailbox = memory->allocate(sizeof(ShmMailbox));
  if (channel->mailbox) new (channel->mailbox.data()) ShmMailbox;
  struct Place {
    int64_t arena, mailbox;
  };
  const auto places =
      all_gather_values(control, Place{memory->rank(), channel->mailbox ? channel->mailbox.offset() : -1});
  for (const Place& place : places) {
    if (place.mailbox < 0) throw CollectiveError("no shared memory is left for group " + control.name());
    channel->arenas.push_back(static_cast<int>(place.arena));
    channel->mail.push_back(reinterpret_cast<ShmMailbox*>(memory->at(static_cast<int>(place.arena), place.mailbox)));
  }
  channel->plan = FoldPlan::of_leaves(channel->size);
  const bool has_core = has_a_core_each(memory->size());
  channel->num_spins = has_core ? kSpinsWithACoreEach : 0;
  channel->awake = has_core ? Milliseconds(1'000) : Milliseconds(100);
  channel->memory = std::move(memory);
  return channel;
}

std::unique_ptr<ProcessGroup> make_shm_group(std::unique_ptr<ProcessGroup> control, std::shared_ptr<ShmMemory> memory,
                                             ShmOptions options) {
  return std::make_unique<ShmGroup>(std::move(control), std::move(memory), options);
}

at::Tensor empty_in(ShmMemory& memory, int64_t numel, at::TensorOptions options) {
  if (!options.device().is_cpu()) return at::empty({numel}, options);
  const int64_t bytes = numel * static_cast<int64_t>(options.dtype().itemsize());
  auto block = std::make_shared<ShmMemory::Block>(memory.allocate(bytes));
  if (!*block) return at::empty({numel}, options);
  void* data = block->data();
  auto give_back = [block = std::move(block), kind = count_taken(bytes), bytes](void*) mutable {
    block.reset();
    count_given_back(kind, bytes);
  };
  return at::from_blob(data, {numel}, std::move(give_back), options);
}

void retire(ShmChannel& channel) { keep_for_ever({}, std::move(channel.mailbox)); }

std::unique_ptr<ProcessGroup> make_shm_group(std::unique_ptr<ProcessGroup> control, ShmOptions options) {
  auto memory = ShmMemory::make(*control);
  return std::make_unique<ShmGroup>(std::move(control), std::move(memory), options);
}

std::vector<int> node_of_ranks(ProcessGroup& group) {
  struct Node {
    char boot[48] = {}, processes[48] = {};
  };
  Node mine;
  std::ifstream("/proc/sys/kernel/random/boot_id").get(mine.boot, sizeof(mine.boot));
  if (readlink("/proc/self/ns/pid", mine.processes, sizeof(mine.processes) - 1) < 0) mine.processes[0] = 0;
  const auto all = all_gather_values(group, mine);
  std::vector<int> nodes(all.size());
  for (size_t rank = 0; rank < all.size(); ++rank) {
    const auto first = std::find_if(
        all.begin(), all.end(), [&](const Node& node) { return std::memcmp(&node, &all[rank], sizeof(Node)) == 0; });
    nodes[rank] = static_cast<int>(first - all.begin());
  }
  return nodes;
}

}  // namespace lockstep
