#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <lockstep/base/rank_info.h>
#include <lockstep/flight/layout.h>

namespace lockstep::flight {

enum class State : uint32_t { kStarting, kReady, kRunning, kEnded };
/// What a rank is busy with; all but kTraining may keep others waiting for long.
enum class Phase : uint32_t { kStarting, kLoading, kTraining, kEvaluating, kSaving, kEnding };
enum class Op : uint8_t {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kAllToAll,
  kBroadcast,
  kBarrier,
  kShow,
  kShowDone,
  kSplit,
  kClose,
  kSend,
  kReceive,
  kStart,  ///< from a rank's start until the world is up
};
enum class Dtype : uint8_t { kNone, kF32, kF64, kBf16, kF16, kI32, kI64, kU8, kOther };
enum class Reduction : uint8_t { kSum, kMax, kMin, kNone };

const char* name_of(State state);
const char* name_of(Phase phase);
const char* name_of(Op op);
const char* name_of(Dtype dtype);
inline bool is_message(Op op) { return op == Op::kSend || op == Op::kReceive; }  ///< between two ranks only

/// A collective as its caller sees it. What ranks may differ in (their shares of an all_to_all) is left 0.
struct Call {
  Op op = Op::kBarrier;
  Dtype dtype = Dtype::kNone;
  Reduction reduction = Reduction::kNone;
  int64_t count = 0;
  int32_t root = -1;  ///< or the peer of a send or receive: a rank of the group
};

/// Digest of a group's calls up to one: equal on two ranks only if they have made the same calls in the same order
/// (but for one chance in 2^64).
uint64_t fingerprint_after(uint64_t before, const Call& call);

/// While it lives, calls of this thread carry the bucket and the name of its first parameter. `label` must outlive it.
class LabelScope {
 public:
  LabelScope(int32_t bucket, std::string_view label);
  ~LabelScope();
  LabelScope(const LabelScope&) = delete;
  LabelScope& operator=(const LabelScope&) = delete;

 private:
  int32_t bucket_before_;
  std::string_view label_before_;
};

/// Where the rings of one job lie on a node: the same name on all its ranks, another one for each job.
/// @return 16 hex digits out of what the launcher calls the job (PMIx, Slurm, torchrun), else of this process.
std::string job_key(const Environment& environment);
std::string ring_path(const std::string& job_key, int rank);
/// Removes rings of this user whose process is gone (its pid may be another's by now). Those of other users, or of
/// processes that cannot be seen from here, stay.
void sweep_rings();
/// The rings of a job that lie here.
std::vector<std::string> find_rings(const std::string& job_key);

/// What a rank leaves for others to read while it runs: a shared memory file that outlives it by minutes at most.
///
/// Threads: all members, at once; none waits for another or makes a system call.
/// Cost: 30 to 60 ns a collective (begin, wait, done).
class Ring {
 public:
  class Group {  // the writer's side of a GroupRecord
   public:
    const std::string& name() const { return name_; }
    uint64_t id() const { return id_; }
    std::span<const int32_t> members() const { return members_; }  ///< world ranks, in the group's order

   private:
    friend class Ring;
    uint16_t slot_ = kNoGroup;
    GroupRecord* record_ = nullptr;  // null: no record was left
    uint64_t id_ = 0, sequence_ = 0, fingerprint_ = 0, messages_ = 0, num_splits_ = 0;
    std::string name_;
    std::vector<int32_t> members_;
  };

  /// @throws IoError there is no room, or another process holds the name.
  static std::unique_ptr<Ring> create(const std::string& path, const RankInfo& info);
  ~Ring();  ///< removes the file
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  /// A group this rank is in. One thread at a time makes calls in it.
  std::unique_ptr<Group> add_world();
  std::unique_ptr<Group> add_child(Group& parent, int color, const std::string& name, std::vector<int32_t> members);

  uint64_t begin(Group& group, const Call& call) noexcept;  ///< @return the call's ticket
  void wait(uint64_t ticket) noexcept;                      ///< this thread waits for it from here on, until done()
  void done(uint64_t ticket) noexcept;
  void leave(uint64_t ticket) noexcept;  ///< gives up waiting: the call stays open

  void set_state(State state) noexcept;
  void set_phase(Phase phase) noexcept;
  Phase phase() const noexcept;
  /// The step that begins now; also the end of the one before, for step_p99 and compute time.
  void set_step(int64_t step) noexcept;
  void set_hang_timeout_s(double seconds) noexcept;  ///< 0: by the steps' length
  void set_folder(const std::string& folder) noexcept;
  void set_exit(int code, std::string_view message) noexcept;  ///< async-signal-safe, as is the next
  void set_died(int signal) noexcept;

  Header& header() noexcept { return file_->header; }

 private:
  struct StepTimes;
  Ring(RingFile* file, std::string path);
  std::unique_ptr<Group> add(uint64_t id, std::string name, std::vector<int32_t> members);
  void describe_members(Group& group) noexcept;

  RingFile* file_;
  std::string path_;
  std::unique_ptr<StepTimes> steps_;
};

}  // namespace lockstep::flight
