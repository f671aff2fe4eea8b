#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/metrics/trace.h>
#include <lockstep/sharding/parameter_gather.h>

namespace lockstep {

/// Parameters of which each rank has updated its rows (ZeRO-1 and 2), made whole while training goes on: gathers start
/// after the update, in the order of forward, and a unit's forward waits for its own alone.
///
/// Until then a parameter's other rows are stale: whoever else reads parameters calls finish() first.
/// Collective over `group`, which is used for nothing else between start() and finish(). Threads: start() while nobody
/// computes; require() and finish() from any lane's thread.
class LateGather {
 public:
  /// A parameter, whole, and the unit (find_units) whose forward reads it first.
  struct Parameter {
    size_t unit;
    at::Tensor tensor;
  };
  /// @param parameters in the order of forward; neighbours travel together up to `bucket_bytes`, the first
  /// ones in less, since forward waits for them.
  LateGather(ProcessGroup& group, const std::vector<Parameter>& parameters, size_t num_units, int64_t bucket_bytes,
             Milliseconds timeout, metrics::TraceTrack track = {});

  void start();
  /// Waits for the parameters of a unit.
  void require(size_t unit);
  void finish();
  size_t num_buckets() const { return buckets_.size(); }

 private:
  struct Bucket {
    std::vector<at::Tensor> parameters;
    ParameterGather gather;
  };
  void finish_until(size_t end);

  metrics::TraceTrack track_;
  std::vector<Bucket> buckets_;
  std::vector<size_t> needs_;  // by unit: buckets that must be there, from the first on
  std::mutex mutex_;
  std::atomic<size_t> done_;  // buckets, from the first on
};

}  // namespace lockstep
