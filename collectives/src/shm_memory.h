#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

class ShmOperation;
struct ShmProgress {
  std::recursive_mutex mutex;  // held while any of them moves on; some consist of others
  std::vector<ShmOperation*> under_way;
};

/// Memory that the ranks of one node have mapped in common: an arena of each rank, which only that rank hands out.
///
/// An arena is a memfd: no name in any file system, so nothing is left behind by a rank that is killed, no other user
/// can open it, and no mount (a container's small /dev/shm) limits it. Peers map it through /proc/PID/fd. It is as
/// large as the machine's memory, but takes none until it is touched; what was touched is kept for the next block.
/// Threads: any.
class ShmMemory : public std::enable_shared_from_this<ShmMemory> {
 public:
  /// Collective over `control`, whose ranks must live on one node; arena r is that of rank r of `control`.
  /// @throws ConfigError on every rank alike, where one of them cannot map the others' memory.
  static std::shared_ptr<ShmMemory> make(ProcessGroup& control);
  ~ShmMemory();
  ShmMemory(const ShmMemory&) = delete;
  ShmMemory& operator=(const ShmMemory&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(arenas_.size()); }
  /// Where `offset` of rank `rank`'s arena lies in this process.
  std::byte* at(int rank, int64_t offset) const { return arenas_[rank].base + offset; }
  /// The place in this rank's arena, if all of it lies there.
  std::optional<int64_t> offset_of(const void* data, int64_t bytes) const;

  /// A part of this rank's arena, whole pages; given back when destroyed.
  class Block {
   public:
    Block() = default;
    Block(std::shared_ptr<ShmMemory> memory, int64_t offset) : memory_(std::move(memory)), offset_(offset) {}
    Block(Block&& other) noexcept : memory_(std::move(other.memory_)), offset_(other.offset_) {}
    Block& operator=(Block&& other) noexcept {
      if (this != &other) {
        reset();
        memory_ = std::move(other.memory_);
        offset_ = other.offset_;
      }
      return *this;
    }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { reset(); }
    explicit operator bool() const { return memory_ != nullptr; }
    int64_t offset() const { return offset_; }
    std::byte* data() const { return memory_->at(memory_->rank(), offset_); }
    void reset() {
      if (memory_) memory_->give_back(offset_);
      memory_.reset();
    }

   private:
    std::shared_ptr<ShmMemory> memory_;
    int64_t offset_ = 0;
  };
  /// An empty Block where the machine's memory does not reach. Every page is there already: touching one neither waits
  /// nor fails.
  Block allocate(int64_t bytes);

  /// The operations of all groups on this memory. Whoever waits for one moves the others on too: a peer may wait for
  /// them first.
  ShmProgress& progress() { return progress_; }

 private:
  struct Arena {
    std::byte* base = nullptr;
    int64_t size = 0;
  };

  ShmMemory(int rank, std::vector<Arena> arenas);
  void give_back(int64_t offset);

  int rank_;
  ShmProgress progress_;
  std::vector<Arena> arenas_;
  std::mutex mutex_;
  std::map<int64_t, int64_t> free_, used_;  // offset -> bytes
  int64_t touched_ = 0;                     // pages below are there
};

}  // namespace lockstep
