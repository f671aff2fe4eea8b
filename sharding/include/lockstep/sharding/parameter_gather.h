#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/sharding/bucket_layout.h>

namespace lockstep {

/// Whole parameters out of the shards of a group's ranks: one collective for all of a bucket or unit.
///
/// Rank r has each parameter's rows of row_range(). start() packs them, or takes them packed; finish() waits and puts
/// everybody's rows where they belong. Scratch: the parameters' bytes, between start() and finish().
class ParameterGather {
 public:
  ParameterGather(ProcessGroup& group, const std::vector<at::Tensor>& parameters, Milliseconds timeout);

  /// From this rank's rows of `parameters`, whole tensors whose other rows are stale.
  void start_from(const std::vector<at::Tensor>& parameters);
  /// From the flat memory of this rank's shard (view() says how it lies).
  void start_from_shard(const at::Tensor& flat_shard);
  /// Into whole tensors. `skip_own`: this rank's rows are there already.
  void finish(const std::vector<at::Tensor>& parameters, bool skip_own);
  bool poll() { return work_.poll(); }

  int64_t shard_numel() const { return layout_.shard_numel(group_->rank()); }
  at::Tensor view(const at::Tensor& flat_shard, size_t parameter) const {
    return layout_.view(flat_shard, parameter, group_->rank());
  }

 private:
  ProcessGroup* group_;
  BucketLayout layout_;
  Milliseconds timeout_;
  at::TensorOptions options_;
  at::Tensor packed_;
  Work work_;
};

}  // namespace lockstep
