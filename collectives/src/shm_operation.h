#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/shm_group.h>

#include "ordered_fold.h"
#include "shm_memory.h"

namespace lockstep {

/// How ranks of one node meet. Call: a collective of a group, numbered alike on all ranks. Each rank has a mailbox, in
/// which it alone writes; call n uses slot n % kSlots of every mailbox, again when all ranks are done with call n -
/// kSlots. Source: what a rank lets the others read, as its slot says: whole (the slot itself, or a tensor in mapped
/// memory) or in rounds, through a ring of kDepth parts that it fills again as the others have read them. Every wait is
/// for a counter that somebody else only increases.
enum class ShmCall : uint8_t { kBarrier, kAllReduce, kReduceScatter, kAllGather, kAllToAll, kBroadcast, kShow };

constexpr int kShmSlots = 16;
constexpr int64_t kShmLetterBytes = 8192;  // room for a source, or a table, with each slot
constexpr int kShmDepth = 4;               // rounds in the ring

struct ShmHeading {  // what must agree over the ranks
  ShmCall call = ShmCall::kBarrier;
  uint8_t op = 0;
  int8_t dtype = 0;
  int8_t unused = 0;
  int32_t root = 0;
  int64_t numel = 0;
  friend bool operator==(const ShmHeading&, const ShmHeading&) = default;
  std::string text() const;
};

enum ShmStep { kStaged, kFolded, kTaken, kNumShmSteps };

struct ShmSlot {
  // One line says all that a small call needs.
  alignas(64) std::atomic<uint64_t> call{0};  // number of the call + 1 once the rest is there
  ShmHeading heading;
  int64_t source = 0;  // offset in the arena
  int32_t is_whole = 1, unused = 0;
  std::byte few[16]{};
  alignas(64) std::array<std::atomic<uint64_t>, kNumShmSteps> rounds{};  // behind this rank, by step
};
static_assert(sizeof(ShmSlot) == 128 && std::atomic<uint64_t>::is_always_lock_free);

struct ShmMailbox {
  alignas(64) std::atomic<uint64_t> done{0};  // all calls below
  ShmSlot slots[kShmSlots];
  alignas(4096) std::byte letters[kShmSlots][kShmLetterBytes];
};

/// A group's end of its shared memory; lives as long as the group or any operation of it.
struct ShmChannel {
  std::shared_ptr<ShmMemory> memory;
  ShmOptions options;
  std::string name;
  int rank = 0, size = 1;
  std::vector<int> arenas;                 // whose arena, by rank of the group
  std::vector<ShmMailbox*> mail;           // by rank
  ShmMemory::Block mailbox;                // this rank's
  FoldPlan plan = FoldPlan::of_leaves(1);  // of one term a rank
  int num_spins = 0;                       // before a wait yields its core
  Milliseconds awake{0};                   // before it sleeps between two looks
  std::atomic<bool> is_broken{false};

  // Under the memory's progress mutex:
  uint64_t next_call = 0;
  uint64_t done_by_all = 0;                  // as last looked up
  std::bitset<kShmSlots> done_out_of_order;  // by slot

  bool has_slot_for(uint64_t call);
  void finish(uint64_t call);
  std::string describe(const std::string& doing) const;
  void refuse_if_broken(const std::string& operation) const;
};

/// One operation under way. Moves on when it is polled or waited for, or any other operation on the same memory is
/// waited for.
class ShmOperation : public Work::Operation {
 public:
  ShmOperation(std::shared_ptr<ShmChannel> channel, Milliseconds timeout);
  ~ShmOperation() override = default;
  ShmOperation(const ShmOperation&) = delete;
  ShmOperation& operator=(const ShmOperation&) = delete;
  void wait() final;
  bool poll() final;
  bool poll_alone() { return move_on() == Progress::kDone; }  ///< as a part of another operation
  void keep(const at::Tensor& tensor) { (first_.defined() ? kept_.emplace_back() : first_) = tensor; }

 protected:
  template <typename Operation>
  friend class ShmStarted;
  void enter();           ///< first move; from now on others move it on too
  void leave() noexcept;  ///< one that is not done breaks its group
  template <typename Condition>
  void wait_until(const Condition& is_so);
  bool is_done() const { return is_done_; }
  virtual void keep_rest_for_ever() {}
  enum class Progress { kNone, kSome, kDone };
  Progress move_on();
  virtual Progress advance() = 0;                    ///< under the progress mutex; never waits
  virtual std::string doing() const = 0;             ///< "all_reduce (sum) of 5 Float (call 3)"
  virtual std::string absent() const { return ""; }  ///< which ranks are waited for

  const std::shared_ptr<ShmChannel> channel_;

 private:
  void wait_a_little(int64_t idle);
  void move_others_on();
  [[noreturn]] void time_out();

  Milliseconds timeout_;
  std::chrono::steady_clock::time_point deadline_, idle_since_;
  std::atomic<bool> is_done_{false};
  std::exception_ptr failure_;
  at::Tensor first_;  // kept too; most operations have no other
  std::vector<at::Tensor> kept_;
};

template <typename Condition>
void ShmOperation::wait_until(const Condition& is_so) {
  for (int64_t idle = 0;;) {
    const Progress progress = move_on();
    if (is_so()) return;
    progress == Progress::kSome ? void(idle = 0) : wait_a_little(++idle);
  }
}

/// The most derived class of every operation: others may call it from the end of its construction to the start of its
/// destruction.
template <typename Operation>
class ShmStarted final : public Operation {
 public:
  template <typename... Arguments>
  explicit ShmStarted(Arguments&&... arguments) : Operation(std::forward<Arguments>(arguments)...) {
    this->enter();
  }
  ShmStarted(const ShmStarted&) = delete;
  ShmStarted& operator=(const ShmStarted&) = delete;
  ~ShmStarted() override { this->leave(); }
};

/// A call of which each rank brings a source and takes from the others', in rounds of three steps:
/// stage (own ring is filled), fold (an owner's results are put into the ring; not all calls have it), take.
class ShmExchange : public ShmOperation {
 public:
  ShmExchange(std::shared_ptr<ShmChannel> channel, ShmHeading heading, Milliseconds timeout);

 protected:
  void keep_rest_for_ever() override;
  /// This rank's source, if it has one. Call one of them in the constructor.
  std::byte* bring_in_slot(int64_t bytes);  ///< at most kShmLetterBytes; filled when post() runs
  void bring_mapped(int64_t offset);
  void bring_ring();
  /// The tensor where it lies, or by the ring.
  void bring(const at::Tensor& tensor);

  [[noreturn]] void no_memory_left();

  virtual void post() {}  ///< the slot is this rank's: writes what lies in it
  virtual void meet() {}  ///< all ranks' slots may be read
  virtual void stage(uint64_t) {}
  virtual void fold_round(uint64_t) {}
  virtual void take(uint64_t) {}
  virtual bool may_post() { return true; }
  virtual bool may_take() const { return true; }
  bool have_met() const { return have_met_; }

  bool is_whole(int rank) const { return slot(rank).is_whole != 0; }
  /// Start of the source of `rank`, of the part of its ring for `round` if it has one.
  std::byte* source(int rank, uint64_t round) const;
  std::byte* letter(int rank) const { return channel_->mail[rank]->letters[call_ % kShmSlots]; }
  ShmSlot& slot(int rank) const { return channel_->mail[rank]->slots[call_ % kShmSlots]; }

  Progress advance() override;
  std::string doing() const override;
  std::string absent() const override;

  const ShmHeading heading_;
  uint64_t rounds_ = 0;  // how many; known to all alike once they have met
  bool has_fold_ = false;
  bool is_pushed_ = false;    // folding puts the results where they belong: nothing is left to take
  bool must_linger_ = false;  // until all have taken from the source, which is the caller's or this operation's

 private:
  bool all_have_posted();
  void compare();
  bool is_behind_all(ShmStep step, uint64_t rounds);
  bool fill_ring();
  bool run();
  void step(ShmStep which);

  const uint64_t call_;
  bool is_posted_ = false, has_ring_ = false;
  std::atomic<bool> have_met_{false};
  int64_t source_ = 0;
  int num_posted_ = 0;                                   // ranks below have
  std::array<uint64_t, kNumShmSteps> mine_{}, least_{};  // rounds behind this rank, behind all others as last seen
  ShmMemory::Block ring_;
};

/// A peer that is late may still read and write what an operation that was given up had shown: it stays until the
/// process ends.
void keep_for_ever(std::vector<at::Tensor> tensors, ShmMemory::Block block);

/// Copies parts that do not overlap to memory, not to this core's caches.
void copy_past_caches(std::byte* to, const std::byte* from, int64_t bytes);

}  // namespace lockstep
