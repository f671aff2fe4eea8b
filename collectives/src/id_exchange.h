#pragma once

#include <chrono>
#include <cstddef>
#include <span>
#include <string>

#include <lockstep/base/rank_info.h>

namespace lockstep {

/// Where the ranks of one job find rank 0 before any group is there: NCCL's unique id has to travel first.
///
/// Messages, little endian, over TCP and in files alike:
///     request: magic u64, job u64, nonce u64, world_size u32, rank u32, length u32, zero u32      (40 bytes)
///     answer:  magic u64, job u64, nonce u64, world_size u32, length u32, then `length` bytes     (32 + length)
///     thanks:  one byte, TCP only; a file is thanked for by removing it
/// `job` is a hash of MeetingPlace::job. `nonce` is drawn by the asking rank and comes back, so that an answer left
/// over from an earlier start is never taken. By file, rank r asks in FILE.r and is answered in FILE.r.answer; both
/// appear by rename and are gone when the exchange is over.
struct MeetingPlace {
  std::string file;  ///< a path on storage that all ranks see; empty: TCP
  std::string host;  ///< where rank 0 runs
  int port = 0;      ///< where rank 0 listens while the exchange lasts
  std::string job;   ///< tells jobs, and starts of one job, apart
  std::string describe() const;
};

/// LOCKSTEP_ID_FILE if set, else MASTER_ADDR and MASTER_PORT as torchrun sets them; job from TORCHELASTIC_RUN_ID and
/// TORCHELASTIC_RESTART_COUNT, or SLURM_JOB_ID. Where torchrun's own store holds MASTER_PORT
/// (TORCHELASTIC_USE_AGENT_STORE=True) the port after it is meant.
/// @throws ConfigError when the environment names no place.
MeetingPlace meeting_place(const Environment& environment);

/// Rank 0's `id` replaces that of every other rank. Collective; all pass the same world_size and length.
/// Security: whoever reaches the port or the file may read the id, as NCCL's own traffic; strangers, silent
/// connections and other jobs are turned away and delay nobody.
/// @throws ConfigError      something else answers there, or the ranks differ in world_size or length.
/// @throws CollectiveError  not all ranks came within `timeout`; rank 0 names those that did not.
void exchange_id(const MeetingPlace& place, int rank, int world_size, std::span<std::byte> id,
                 std::chrono::milliseconds timeout);

}  // namespace lockstep
