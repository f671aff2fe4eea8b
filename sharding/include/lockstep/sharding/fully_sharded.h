#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/metrics/trace.h>

namespace lockstep {

/// The parameters of one unit, frozen ones too: tensors whose storage FullySharded takes over.
struct ShardedUnit {
  std::string name;
  std::vector<at::Tensor> parameters;  ///< f32, with their shapes; storage may be missing
  size_t part = 0;     ///< of the model: each forward and backward runs through one part (a pipeline stage's chunks)
  bool stays = false;  ///< gathered before the first forward of a step, freed at its end (what lies in no unit)
};

/// Parameters that exist whole only while they are used (ZeRO-3): each rank keeps its rows, a unit is gathered before
/// its forward and backward and freed after.
///
/// The next unit in order is fetched while one computes, forward and backward; at most two units that do not stay are
/// alive. Parameters keep their identity: each is a view into its unit's memory, whose storage shrinks to nothing and
/// grows again; what autograd saved of them follows. The order of gathers is that of the first forward, the same on all
/// ranks, so a group of its own is needed where other collectives run in between.
/// Threads: one. Cost: (F-1)/F x bytes received for each forward and each backward of a unit, F ranks a replica.
/// Source: Zhao et al., PyTorch FSDP, VLDB 2023, arXiv:2304.11277.
class FullySharded {
 public:
  /// @param group the ranks a replica is sharded over. Collective. @param track gathers: their starts, and the waits.
  FullySharded(ProcessGroup& group, std::vector<ShardedUnit> units, Milliseconds timeout,
               metrics::TraceTrack track = {});
  ~FullySharded();
  FullySharded(const FullySharded&) = delete;
  FullySharded& operator=(const FullySharded&) = delete;

  /// This rank's rows of a parameter: what initialisation, optimizer and checkpoint work on. Always there.
  const at::Tensor& shard(size_t unit, size_t parameter) const;

  // One forward, one backward, or one after the other: begin(); then for each unit, as the model calls them,
  // before_forward(), after_forward(); in backward before_backward(), after_backward(); end() frees what is left.
  // `both`: backward follows at once, so the last unit of forward stays for it. after_backward() comes with the unit's
  // last gradient; one with frozen parameters may be `still_read` then, and is freed before the next one's backward.
  void begin(bool both = false);
  void before_forward(size_t unit);
  void after_forward(size_t unit);
  void before_backward(size_t unit);
  void after_backward(size_t unit, bool still_read = false);
  void end();

  // Between begin() and end(): takes part in the gathers of a forward or backward that other ranks run and this one
  // does not: a backward as this rank's last one. on_backward is called where other ranks have a unit's gradients: what
  // they send then wants to be received.
  void absent_forward(size_t part);
  void absent_backward(size_t part, const std::function<void(size_t unit)>& on_backward);

  /// Frees the units that stay: their values are about to change.
  void end_step();

  int max_alive() const { return max_alive_; }  ///< units that do not stay, whole at one time so far

 private:
  struct State;
  struct BackwardCall {
    size_t unit;
    bool is_before, still_read;
  };

  void require(size_t unit);
  void start(size_t unit);
  void finish(size_t unit);
  void prefetch_beside(size_t unit, int direction);
  void free(size_t unit);

  ProcessGroup& group_;
  Milliseconds timeout_;
  metrics::TraceTrack track_;
  std::vector<std::unique_ptr<State>> units_;
  std::vector<size_t> order_, seen_;                      // of forward: expected, and in this one
  std::map<size_t, std::vector<BackwardCall>> backward_;  // the last one of each part
  std::vector<BackwardCall> calls_;                       // in this backward
  bool both_ = false;
  int alive_ = 0, max_alive_ = 0;
};

}  // namespace lockstep
