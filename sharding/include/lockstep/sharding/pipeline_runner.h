#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/sharding/pipeline_schedule.h>

namespace lockstep {

/// What a stage computes. Micro-batches are counted within this pipeline, chunks within this stage.
struct PipelineCallbacks {
  /// The layers of one chunk. @param input what the position before returned: its dtype, strides and numbers, on a
  /// graph of this stage's own; undefined at position 0, which fetches the batch itself. @return the output, any dtype;
  /// `input` itself where a stage has no layers; at the last position the loss (in evaluation: any tensor).
  std::function<at::Tensor(int64_t micro_batch, int chunk, at::Tensor input)> forward;
  /// The gradient that backward starts with at the last position, e.g. 1 / divisor. Not set: 1.
  std::function<at::Tensor(int64_t micro_batch, const at::Tensor& loss)> loss_gradient;
  /// Around each backward, e.g. a GradientReducer's begin_leaf and end_leaf. Also called where no gradient flows.
  std::function<void(int64_t micro_batch, int chunk)> before_backward, after_backward;
  /// Told when each action begins and ends, for traces. Waiting for a peer lies between actions.
  enum class Moment { kBegin, kEnd };
  std::function<void(const PipelineAction&, Moment)> observe;
};

struct PipelineRunnerOptions {
  at::Device device = at::kCPU;  ///< where received tensors go
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
};

/// Runs one stage's part of a schedule: the stages together compute what one process would with the same micro-batches,
/// gradients of each micro-batch the same bits, for any number of stages and chunks.
///
/// Cuts: an input is a tensor whose graph ends here; the gradient that arrives at it goes back as it is, with its own
/// strides. A tensor that requires no gradient (integers, or nothing trainable before it) sends none back: its header
/// says so, and both sides leave the transfers out. Shapes may differ from one micro-batch to the next.
/// Memory: once sent, an output is held by whatever of its own graph saved it, and no more; a micro-batch's graph and
/// tensors go with its backward.
///
/// Collective over `pipeline` (rank = stage), with the same schedule on every stage; other pipelines may have other
/// schedules. Threads: one. Back ends: those whose transfers do not wait for each other (local, MPI; on NCCL a header
/// would wait for the body beside it).
class PipelineRunner {
 public:
  explicit PipelineRunner(ProcessGroup& pipeline, PipelineRunnerOptions options = {});
  ~PipelineRunner();
  PipelineRunner(const PipelineRunner&) = delete;
  PipelineRunner& operator=(const PipelineRunner&) = delete;

  /// One step, or one evaluation if the schedule is forward only (then without graphs). The schedule has passed
  /// validate().
  /// @return on the stage of the last position the losses (or outputs) by micro-batch, detached; elsewhere nothing.
  /// @throws CheckFailed the loss requires no gradient; stages run different schedules. What a callback throws passes
  /// through; the group cannot be used after that.
  std::vector<at::Tensor> run(const PipelineSchedule& schedule, const PipelineCallbacks& callbacks);

 private:
  class Step;
  struct Exchange;
  ProcessGroup& pipeline_;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace lockstep
