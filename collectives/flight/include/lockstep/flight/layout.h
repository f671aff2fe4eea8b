#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

/// The bytes of a rank's ring, /dev/shm/lockstep-<job key>-<rank>, as its writer (ring.h) and its readers (report.h)
/// map them. All numbers are little-endian, aligned to their size; texts are UTF-8, zero-terminated, cut to fit.
///
///       0  Header             16,384 bytes: who, how far, orders, texts
///   16384  GroupRecord        64 x 128 bytes: the groups this rank is in, with their last call
///   24576  members            16,384 x u32: world ranks of groups that are no arithmetic progression
///   90112  Entry              2,048 x 128 bytes: the last calls; call number `ticket` lies in entry ticket % 2048
///  352256  (end)
///
/// An entry is 16 words of 8 bytes. Word 0 is its lock: 2 x ticket + 1 while it is written, 2 x ticket + 2 when it is
/// whole. A reader takes word 0, the others, then word 0 again; if it was odd, or changed, the entry is torn and
/// skipped. Word 1, t_done, is written later on its own.
///
///   Example: the third call (ticket 2) of a rank, an all_reduce (op 1, sum) of 1,024 f32 that is call 3 of group slot
///   0, bucket 7, begun at tick 0x5000 and not done, begins at byte 90112 + 2 x 128 with
///     06 00 00 00 00 00 00 00   lock 6 = 2 x 2 + 2: whole
///     00 00 00 00 00 00 00 00   t_done 0: not done
///     00 50 00 00 00 00 00 00   t_enqueue
///     03 00 00 00 00 00 00 00   sequence in its group
///     xx xx xx xx xx xx xx xx   fingerprint of the group's calls 1 to 3
///     00 04 00 00 00 00 00 00   count
///     00 00 01 00 07 00 00 00   group slot (u16), op (u8: 0 is all_reduce), dtype (u8: 1 is f32), bucket (i32)
///     ff ff ff ff 00 00 00 00   root or peer (i32: -1 is none), reduction (u8: 0 is sum), 3 unused
///   and 64 bytes of label, "block0.attention.query.weight".
///
/// Times are ticks: of the time stamp counter where it is invariant (Header::clock = 1), else nanoseconds of
/// CLOCK_MONOTONIC. Only readers of the same machine make sense of them.
namespace lockstep::flight {

using Word = std::atomic<uint64_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 8, "words are shared between processes");

inline constexpr uint64_t kMagic = 0x544847494c46534cULL;  // "LSFLIGHT"
inline constexpr uint32_t kVersion = 1;
inline constexpr size_t kNumEntries = 2048, kMaxGroups = 64, kMaxMembers = 16384, kMaxWaits = 8;
inline constexpr size_t kEntryWords = 16, kLabelWord = 8, kLabelBytes = 64;
inline constexpr uint16_t kNoGroup = 0xffff;  // of calls in groups for which there was no record left

/// What a rank is told by its node's agent (Header::order).
enum class Order : uint32_t { kNone, kEndAsHung };

struct Header {
  Word magic;  // 0; written last when the ring is made
  uint32_t version, clock;
  int32_t pid, rank;
  uint64_t pid_start_time, pid_namespace;                 // /proc/PID/stat field 22; inode of /proc/self/ns/pid
  int32_t world_size, local_rank, local_size, node_rank;  // 40
  std::array<char, 64> host;                              // 56

  std::atomic<uint32_t> state, phase;  // 120: State, Phase
  Word step, beats;                    // 128: -1 before the first step; of the heartbeat thread, one a second
  Word hang_timeout_ns, step_p99;      // 144: 0: chosen by the reader; ticks, 0: not known yet
  Word compute, wall, timed_steps;     // 160: ticks of the last 20 steps, without and with waiting; how many were seen
  std::array<std::array<Word, 2>, kMaxWaits> waits;  // 184: ticket + 1 (0: does not wait), since
  Word next_ticket;                                  // 312
  std::atomic<uint32_t> num_groups, num_members;     // 320
  std::atomic<uint32_t> exit_kind;                   // 328: 0 none, 1 exit code, 2 signal; written after what it tells
  int32_t exit_value;
  std::atomic<uint32_t> order, order_seen;            // 336: Order; a futex; the rank has heard it
  std::atomic<uint32_t> stack_number, notice_number;  // 344: how often `stack` and `notice` were written; a futex
  std::array<char, 488> exit_message;                 // 352
  std::array<char, 512> folder;                       // 840: where verdicts are written, may be empty
  std::array<char, 1024> notice;                      // 1352: from the agent, to be logged as a warning
  std::array<char, 6144> order_text;                  // 2376: the verdict, before `order`
  std::array<char, 7864> stack;                       // 8520: of the main thread, a frame a line
};
static_assert(sizeof(Header) == 16384 && offsetof(Header, host) == 56 && offsetof(Header, waits) == 184 &&
              offsetof(Header, exit_message) == 352 && offsetof(Header, stack) == 8520);

struct GroupRecord {
  uint64_t id;            // the same on all members: a hash of the split that made it
  int32_t size, rank;     // members; which of them this rank is
  int32_t first, stride;  // of the members' world ranks, where they are an arithmetic progression,
  uint32_t members_at;    // else this is where they begin; kMaxMembers: unknown, there was no room
  uint32_t unused;
  Word begun, last_ticket, fingerprint;  // collectives begun; the last of them; see fingerprint_after()
  Word messages;                         // sends and receives begun: not part of the sequence
  std::array<char, 64> name;
};
static_assert(sizeof(GroupRecord) == 128);

struct Entry {
  std::array<Word, kEntryWords> words;
};
static_assert(sizeof(Entry) == 128);

struct RingFile {
  Header header;
  std::array<GroupRecord, kMaxGroups> groups;
  std::array<uint32_t, kMaxMembers> members;
  std::array<Entry, kNumEntries> entries;
};
static_assert(sizeof(RingFile) == 352256 && offsetof(RingFile, groups) == 16384 &&
              offsetof(RingFile, members) == 24576 && offsetof(RingFile, entries) == 90112);

}  // namespace lockstep::flight
