#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/collectives/mesh.h>
#include <lockstep/data/dataset.h>
#include <lockstep/metrics/trace.h>
#include <lockstep/optim/optimizer.h>
#include <lockstep/sharding/fully_sharded.h>
#include <lockstep/sharding/gradient_sync.h>
#include <lockstep/sharding/late_gather.h>
#include <lockstep/sharding/layer_stack.h>
#include <lockstep/sharding/pipeline_runner.h>
#include <lockstep/sharding/recompute.h>
#include <lockstep/sharding/sharded_reducer.h>
#include <lockstep/train/options.h>
#include <lockstep/train/task.h>

#include "lanes.h"
#include "parameter_table.h"
#include "step_exchange.h"

namespace lockstep::train {

/// The model of this rank under the run's layout, with its gradients and its optimizer: everything whose shape depends
/// on how the run is cut over ranks. The Trainer above it knows steps, not layouts.
///
/// Collective: all ranks of the world make the same calls. Threads: one, which is lane 0 of `lanes`.
class ParallelModel {
 public:
  /// @param trace told what lanes, collectives and the optimizer do when; null: nobody.
  ParallelModel(const Mesh& mesh, at::Device device, Task& task, const Options& options, LanePool& lanes,
                metrics::Trace* trace);
  ~ParallelModel();
  ParallelModel(const ParallelModel&) = delete;
  ParallelModel& operator=(const ParallelModel&) = delete;

  /// Micro-batches of the global batch that this rank sees, ascending.
  std::vector<int64_t> leaves() const { return sync_->leaves(); }
  /// Whether this rank is the one, of those that see the same micro-batches, that counts them.
  bool counts_batches() const {
    return mesh_.pipeline().rank() == 0 && mesh_.context().rank() == 0 && mesh_.tensor().rank() == 0;
  }
  int64_t num_parameters() const;  ///< of the whole model, trainable ones

  void initialize(uint64_t seed);
  /// What a checkpoint holds, as views into this rank's part. After a load, call loaded().
  std::vector<checkpoint::StateTensor> state();
  void loaded();

  /// Forward and backward of this rank's micro-batches, in the order of leaves().
  /// @param divisor what the loss is divided by: the count of the whole step.
  /// @return this rank's part of the step's sums, gradients' squares included.
  StepReport compute(int64_t step, int64_t divisor, const std::vector<data::Batch>& batches);
  /// After compute(): applies or drops the gradients.
  void update(const optim::StepScalars& scalars);
  void drop_gradients();
  /// Of this rank's part; empty when all are finite.
  std::string name_of_non_finite_gradient() const;

  /// Loss and right answers over `count` micro-batches of an evaluation, of which this rank computes its share.
  StepReport evaluate(int64_t count, const std::function<data::Batch(int64_t)>& get);

  /// The whole model, where this rank has it.
  std::shared_ptr<torch::nn::Module> whole() const;

 private:
  struct Scope;
  class Runner;

  void build();
  std::vector<LayerStack::Range> chunks_of(const LayerStack& stack) const;
  size_t part_of(const FoundUnit& unit) const;
  bool is_counted(const ModelParameter& parameter) const;
  void build_sync();
  void attach_lanes(const std::vector<size_t>& parts);
  void build_optimizer();
  at::Tensor local_part(size_t parameter) const;
  const at::Tensor& grad(size_t trainable) const { return places_[trainable].sync->grad(places_[trainable].index); }
  // How optimizer state (ZeRO: and more) is sharded: over how many ranks, and which of them a data rank is.
  std::pair<int, int> sharding(bool is_of_experts, int data_rank) const;

  void compute_in_lanes(int64_t step, const std::vector<data::Batch>& batches, StepReport& report);
  void compute_in_rounds(int64_t step, const std::vector<data::Batch>& batches, StepReport& report);
  void compute_in_stages(int64_t step, const std::vector<data::Batch>& batches, StepReport& report);
  LossSum run_chunk(LayerStack& stack, int chunk, const at::Tensor& input, const data::Batch& batch);
  LossSum compute_leaf(int lane, int64_t step, int64_t leaf, const data::Batch& batch);
  at::Tensor loss_gradient(const at::Tensor& loss) const;
  void begin_leaf(int lane, int64_t leaf);
  void end_leaf(int lane);
  void absent_forward(int part);
  void absent_backward(int part);
  void join_terms();
  void join_terms(GradientSync& sync);
  void wait_for_gradients();
  void join_tied();
  bool tells_loss() const { return mesh_.tensor().rank() == 0; }  // equal on all ranks of a tensor group
  StepReport evaluate_in_stages(int64_t rounds, int64_t count, const std::function<data::Batch(int64_t)>& get);
  const PipelineSchedule& schedule(int64_t micro_batches);
  bool is_pipelined() const { return options_.mesh.pipeline > 1; }
  data::Batch on_device(const data::Batch& batch) const;

  const Mesh& mesh_;
  at::Device device_;
  Task& task_;
  const Options& options_;
  LanePool& lanes_;
  struct Tracks {
    std::vector<metrics::TraceTrack> lanes;
    metrics::TraceTrack collectives, gathers, optimizer;
  };
  const Tracks tracks_;
  ModelParallel parallel_;

  std::vector<std::shared_ptr<torch::nn::Module>> models_;  // by lane; parameters share lane 0's storage
  std::vector<std::unique_ptr<Runner>> runners_;            // by lane
  ParameterTable table_;
  std::unique_ptr<ProcessGroup> shard_group_, gather_group_, expert_shard_group_;
  std::unique_ptr<FullySharded> fully_sharded_;
  std::unique_ptr<GradientSync> sync_;
  ShardedReducer* sharded_reducer_ = nullptr;  // sync_, where gradients leave after each micro-batch
  std::unique_ptr<GradientSync> expert_sync_;  // of experts that are shared among ranks; a lane for each of these
  struct Place {
    GradientSync* sync;
    size_t index;
  };
  std::vector<Place> places_;  // of trainable parameters
  // Where parameters are whole here and each rank updates its rows.
  std::unique_ptr<LateGather> updated_, updated_experts_;
  std::unique_ptr<optim::Optimizer> optimizer_;
  std::unique_ptr<PipelineRunner> runner_;
  PipelineSchedule schedule_;  // of the last step
  float weight_ = 0;           // of the loss, in this step
  bool first_step_ = true;
};

}  // namespace lockstep::train
