#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include <lockstep/base/fs.h>

namespace lockstep::format {

/// Who starts, and how careful a start is. The environment is the caller's to read.
struct Starter {
  bool take_over = false;  ///< go on even where an earlier start still lives; it stops at its next save
  std::string job_id;      ///< of the batch system, empty: none; an earlier start of our own job is over
  int64_t job_start = 0;   ///< which start of that job; one that was cut off may come late, and must not supersede us
  std::chrono::milliseconds watch{30'000};  ///< how long another host's heartbeat is watched, by our clock alone
};

/// The highest epoch of a run, 0: none. Whoever holds a lower one has been superseded.
uint64_t newest_epoch(Fs& fs, const std::string& run_dir);

/// Creates epoch/E with E = highest + 1, which makes this process the owner of the run directory (made if need be).
/// The file names job, host, boot, process and its start time; it appears whole or not at all.
/// @throws Fenced an earlier start lives (same boot: its process exists; else: its heartbeat moves while we watch), or
/// another start, no earlier one of our own job, won the same E.
uint64_t create_epoch(Fs& fs, const std::string& run_dir, const Starter& starter);

/// Signs off: the next start need not wait, whatever host it is on. At the orderly end.
void release_epoch(Fs& fs, const std::string& run_dir, uint64_t epoch);

/// Shows a starter on another host that we live; `count` must move. Every few seconds, far below Starter::watch.
void beat(Fs& fs, const std::string& run_dir, uint64_t epoch, uint64_t count);

}  // namespace lockstep::format
