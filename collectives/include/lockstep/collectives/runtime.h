#pragma once

#include <functional>
#include <memory>
#include <string>

#include <lockstep/base/error.h>
#include <lockstep/base/rank_info.h>
#include <lockstep/collectives/process_group.h>

namespace lockstep {

struct RuntimeOptions {
  std::string device = "auto";   ///< auto | cpu | cuda
  std::string backend = "auto";  ///< auto | shm | mpi | nccl; auto on CPUs: shm on one node, both on several
  Milliseconds collective_timeout = ProcessGroup::kDefaultTimeout;
  /// How long a rank may keep others waiting before the watchdog ends the job with 76. 0: 5 times the longest of 100
  /// steps, at least 30 s; 120 s until steps are known; twice that, at least 240 s, while it starts or evaluates;
  /// 2,100 s while it loads or saves.
  double hang_timeout_s = 0;
};

/// What a rank has: its identity, its device and the world's group. Owns MPI; the only owner.
class Runtime {
 public:
  Runtime(RankInfo info, at::Device device, std::unique_ptr<ProcessGroup> world);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;
  const RankInfo& info() const { return info_; }
  at::Device device() const { return device_; }
  ProcessGroup& world() const { return *world_; }

 private:
  RankInfo info_;
  at::Device device_;
  std::unique_ptr<ProcessGroup> world_;
};

/// The body of every main(): starts MPI (or not, when alone), logging and the back end, runs `body`, and ends so that
/// no rank dies alone: any exception logs one ERROR, aborts communicators and calls MPI_Abort with the error's exit
/// code. Only the healthy path finalizes MPI. Installs SIGUSR1/SIGTERM handlers first thing (see stop_requested) and
/// sets the umask to 077. Call after flags are parsed; a ConfigError thrown by `body` on every rank is logged once, by
/// rank 0. Preempted, which all ranks throw alike, is no failure: it ends like the healthy path, with its own exit
/// code.
/// @return the process's exit code.
int run_rank(const RuntimeOptions& options, const std::function<int(Runtime&)>& body);

/// For a mistake found before run_rank(), in flags mostly: says it on standard error, once for the job where every rank
/// makes it. @return the process's exit code.
int report_before_run(const Error& error);

/// True once SIGUSR1 or SIGTERM arrived. Async-signal-safe to set, cheap to read.
bool stop_requested() noexcept;

}  // namespace lockstep
