#pragma once

#include <optional>
#include <string>
#include <vector>

#include <lockstep/base/launch_records.h>

#include "job.h"
#include "node_watch.h"
#include "restart_policy.h"

namespace lockstep::launcher {

/// All that is known about how a start ended.
struct Evidence {
  JobEnd end;
  bool under_mpirun = false;
  bool on_several_hosts = false;
  bool was_ready = false;
  std::optional<int> done;                  ///< what the ranks said when they closed the world
  std::vector<FailureRecord> failures;      ///< what those that failed said
  int64_t out_of_memory_kills = 0;          ///< by the kernel, on this machine, meanwhile
  std::optional<ClusterFinding> finding{};  ///< of the watch, where it ended the job
  std::optional<ClusterFinding> death{};    ///< of a rank, as the watch saw it, where mpirun ended the job
  std::optional<ClusterFinding> loss{};     ///< of a host, so
};

struct Verdict {
  Ending ending;                             ///< durable_step and can_do_without_host are the caller's
  std::optional<std::string> first_failure;  ///< how the trouble began, if anything said so
};

/// Finds out what happened from what ranks wrote down, from mpirun's exit code and from its words, in that order of
/// trust. Rank 0's "done" is what success of our programs is: mpirun 5 ends with 0 after it lost a host.
Verdict judge(const Evidence& evidence);

}  // namespace lockstep::launcher
