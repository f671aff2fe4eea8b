#pragma once

#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/metrics/trace.h>

namespace lockstep::train {

struct StepRange {
  int64_t first = 0, last = -1;  ///< counted from 1, both included
  bool is_empty() const { return last < first; }
};
/// "10:12"; "": no steps. @throws ConfigError
StepRange parse_steps(const std::string& text);

/// --profile_steps: what every rank does in some steps, as one Chrome trace. Without any, the trace stays off.
///
/// Collective: all ranks make the same calls. Threads: those of Trace.
class Profile {
 public:
  /// @param directory for the file; made when there is something to write.
  Profile(ProcessGroup& world, at::Device device, Fs& fs, std::string directory, StepRange steps, Milliseconds timeout);

  metrics::Trace& trace() { return trace_; }
  metrics::TraceTrack track(const std::string& name) { return {&trace_, name}; }

  /// Before a step, `done` steps are behind.
  void begin_step(int64_t done);
  /// After it and what follows it (checkpoint, evaluation). After the last one, or where the run `ends`, rank 0 writes
  /// the file; storage that fails costs the trace, not the run.
  void end_step(int64_t done, bool ends);

 private:
  void write(StepRange steps);
  int64_t clock_offset_to(int peer);
  std::string take_from(int peer);

  ProcessGroup& world_;
  at::Device device_;
  Fs& fs_;
  std::string directory_;
  StepRange steps_;
  int64_t first_done_ = 0;
  Milliseconds timeout_;
  metrics::Trace trace_;
};

}  // namespace lockstep::train
