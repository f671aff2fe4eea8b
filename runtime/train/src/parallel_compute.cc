// ParallelModel's computing half: micro-batches through lanes, or through this rank's stage of a pipeline.
#include <atomic>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>

#include <ATen/Context.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/autograd.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/rank_order_sum.h>
#include <lockstep/sharding/tied.h>

#include "parallel_model.h"

namespace lockstep::train {
namespace {

// How often each of a model's buffers was written so far.
std::vector<uint32_t> buffer_versions(const torch::nn::Module& model) {
  std::vector<uint32_t> versions;
  for (const at::Tensor& buffer : model.buffers()) versions.push_back(buffer._version());
  return versions;
}

// What forward writes depends on which micro-batches ran here, and in which order: on the layout.
void refuse_written_buffers(const torch::nn::Module& model, const std::vector<uint32_t>& versions_before) {
  const auto buffers = model.named_buffers();
  for (size_t i = 0; i < buffers.size(); ++i) {
    if (buffers[i].value()._version() == versions_before[i]) continue;
    throw ConfigError("the model's forward writes its buffer " + buffers[i].key() +
                      ", so its value would depend on the number of ranks. Mend: GroupNorm or LayerNorm instead of "
                      "BatchNorm; keep other such state in the task");
  }
}

void add_loss(StepReport& report, const LossSum& loss) {
  report.loss.add(loss.sum.item<float>());
  report.has_correct |= loss.correct.defined();
  if (loss.correct.defined()) report.correct.add(loss.correct.item<double>());
}

const char* name_of(ActionKind kind) {
  switch (kind) {
    case ActionKind::kForward:
      return "forward";
    case ActionKind::kBackward:
      return "backward";
    case ActionKind::kSendForward:
      return "send forward";
    case ActionKind::kSendBackward:
      return "send backward";
    case ActionKind::kRecvForward:
      return "receive forward";
    default:
      return "receive backward";
  }
}

// Actions do not overlap: one of them is under way at a time.
decltype(PipelineCallbacks::observe) recorder_of_actions(const metrics::TraceTrack& track) {
  if (!track.on()) return nullptr;
  return [track, begin_ns = int64_t{0}](const PipelineAction& action, PipelineCallbacks::Moment moment) mutable {
    metrics::Trace* trace = track.on();
    if (!trace) return;
    if (moment == PipelineCallbacks::Moment::kBegin) {
      begin_ns = trace->now_ns();
    } else {
      trace->record(track.number(), name_of(action.kind), "pipeline", begin_ns, trace->now_ns() - begin_ns,
                    {{"micro_batch", action.micro_batch}, {"chunk", action.chunk}});
    }
  };
}

}  // namespace

// What holds while a micro-batch computes.
struct ParallelModel::Scope {
  Scope(const ParallelModel& model, int64_t step, int64_t leaf)
      : key({model.options_.seed, static_cast<uint64_t>(step), static_cast<uint64_t>(leaf), model.weight_}),
        autocast(model.device_.type(), model.options_.precision == "bf16") {
    // Weights that come and go have no place where a copy could be known by.
    if (model.options_.zero_stage < 3) share_casts.emplace();
    if (!model.device_.is_cpu()) {
      at::Generator generator = at::globalContext().defaultGenerator(model.device_);
      const std::lock_guard lock(generator.mutex());
      generator.set_current_seed(nn::library_seed(nn::step_key()));
    }
  }
  nn::StepScope key;
  nn::AutocastGuard autocast;
  std::optional<nn::WeightCacheScope> share_casts;
};

StepReport ParallelModel::compute(int64_t step, int64_t divisor, const std::vector<data::Batch>& batches) {
  StepReport report;
  if (is_planted(Plant::kLossScaleOfOneRank) && mesh_.data().rank() > 0) ++divisor;
  weight_ = static_cast<float>(1.0 / static_cast<double>(divisor));
  nn::begin_step();
  sync_->begin_step();
  if (expert_sync_) expert_sync_->begin_step();
  if (updated_ && !table_.units()[0].unit) updated_->require(0);
  if (is_pipelined()) {
    compute_in_stages(step, batches, report);
  } else if (sharded_reducer_) {
    compute_in_rounds(step, batches, report);
  } else {
    compute_in_lanes(step, batches, report);
  }
  if (fully_sharded_) fully_sharded_->end_step();
  if (updated_) updated_->finish();  // of units that no micro-batch here came to
  first_step_ = false;
  sync_->fold();
  if (expert_sync_) expert_sync_->fold();
  join_terms();
  join_tied();
  report.squares = sync_->publish();
  if (expert_sync_) report.squares.merge(expert_sync_->publish());
  if (mesh_.context().rank() != 0) report.squares = {};  // equal on all ranks of a context group
  return report;
}

void ParallelModel::compute_in_lanes(int64_t step, const std::vector<data::Batch>& batches, StepReport& report) {
  const auto leaves = sync_->leaves();
  std::vector<LossSum> losses(batches.size());
  std::atomic<size_t> next{0};
  lanes_.run([&](int lane) {
    for (size_t i = next++; i < batches.size(); i = next++) losses[i] = compute_leaf(lane, step, leaves[i], batches[i]);
  });
  for (const LossSum& loss : losses) {
    if (tells_loss()) add_loss(report, loss);
  }
}

void ParallelModel::compute_in_rounds(int64_t step, const std::vector<data::Batch>& batches, StepReport& report) {
  const auto leaves = sync_->leaves();
  for (size_t round = 0; round < static_cast<size_t>(sharded_reducer_->num_rounds()); ++round) {
    if (fully_sharded_) fully_sharded_->begin(/*both=*/true);
    if (round < leaves.size()) {
      const LossSum loss = compute_leaf(0, step, leaves[round], batches[round]);
      if (tells_loss()) add_loss(report, loss);
    } else {
      absent_forward(0);
      absent_backward(0);
    }
    if (fully_sharded_) fully_sharded_->end();
  }
}

LossSum ParallelModel::compute_leaf(int lane, int64_t step, int64_t leaf, const data::Batch& host_batch) {
  auto& model = *models_[lane];
  const data::Batch batch = on_device(host_batch);
  model.train();
  begin_leaf(lane, leaf);
  const auto versions = first_step_ ? buffer_versions(model) : std::vector<uint32_t>();
  LossSum loss;
  {
    const metrics::TraceSpan span(tracks_.lanes[lane], "forward", "compute", {"micro_batch", leaf});
    const Scope scope(*this, step, leaf);
    loss = task_.loss(model, batch);
  }
  if (first_step_) refuse_written_buffers(model, versions);
  // The loss is a sum; its gradient carries the divisor, the same on every rank.
  const metrics::TraceSpan span(tracks_.lanes[lane], "backward", "compute", {"micro_batch", leaf});
  torch::autograd::backward({loss.sum}, {loss_gradient(loss.sum)});
  end_leaf(lane);
  return {loss.sum.detach(), loss.correct.defined() ? loss.correct.detach() : at::Tensor()};
}

// The micro-batch that each rank of the expert group runs now gives this rank's experts a gradient of its own.
void ParallelModel::begin_leaf(int lane, int64_t leaf) {
  sync_->begin_leaf(lane, leaf);
  if (!expert_sync_) return;
  const int sources = mesh_.experts()->size(), rank = mesh_.experts()->rank();
  const int64_t share = options_.num_leaves() / mesh_.data().size();  // equal: resolve() has seen to it
  for (int source = 0; source < sources; ++source) {
    const int from = is_planted(Plant::kExpertOfOtherLeaf) ? sources - 1 - source : source;
    expert_sync_->begin_leaf(lane * sources + source, leaf + (from - rank) * share);
  }
}

void ParallelModel::end_leaf(int lane) {
  sync_->end_leaf(lane);
  if (!expert_sync_) return;
  const int sources = mesh_.experts()->size();
  for (int source = 0; source < sources; ++source) expert_sync_->end_leaf(lane * sources + source);
}

at::Tensor ParallelModel::loss_gradient(const at::Tensor& loss) const {
  return at::full({}, weight_, loss.options().requires_grad(false));
}

// As much of a micro-batch's loss as this chunk has; its output is the sum. The task's code around the model's forward
// runs to its end where the last chunk is.
LossSum ParallelModel::run_chunk(LayerStack& stack, int chunk, const at::Tensor& input, const data::Batch& batch) {
  const bool is_last = chunk + 1 == options_.pipeline_chunks && mesh_.pipeline().rank() + 1 == options_.mesh.pipeline;
  const auto versions = first_step_ ? buffer_versions(stack) : std::vector<uint32_t>();
  LossSum loss;
  const at::Tensor output = stack.run_stage(chunk, input, is_last, [&] { loss = task_.loss(stack, batch); });
  if (first_step_) refuse_written_buffers(stack, versions);
  if (is_last) return loss;
  // A first stage without layers has nothing to say, but must say something.
  return {output.defined() ? output : at::zeros({0}), {}};
}

// With gradients that leave after each micro-batch all pipelines run the same schedule, where they have none of its
// last micro-batches as ranks that only take part in what the others exchange.
void ParallelModel::compute_in_stages(int64_t step, const std::vector<data::Batch>& batches, StepReport& report) {
  const auto leaves = sync_->leaves();
  const auto present = static_cast<int64_t>(leaves.size());
  const int64_t micro_batches = sharded_reducer_ ? sharded_reducer_->num_rounds() : present;
  auto& stack = dynamic_cast<LayerStack&>(*models_[0]);
  stack.train();
  PipelineCallbacks callbacks;
  std::vector<at::Tensor> correct(present);
  callbacks.forward = [&](int64_t micro_batch, int chunk, const at::Tensor& input) {
    if (fully_sharded_) fully_sharded_->begin();
    at::Tensor output;
    if (micro_batch < present) {
      const Scope scope(*this, step, leaves[micro_batch]);
      const int64_t other = is_planted(Plant::kSwappedMicroBatches) && input.defined() ? micro_batch ^ 1 : micro_batch;
      const LossSum loss = run_chunk(stack, chunk, input, on_device(batches[other < present ? other : micro_batch]));
      output = loss.sum;
      if (loss.correct.defined()) correct[micro_batch] = loss.correct.detach();
    } else {
      absent_forward(chunk);
      output = input.defined() ? input : at::zeros({}, device_).requires_grad_();
    }
    if (fully_sharded_) fully_sharded_->end();
    return output;
  };
  callbacks.loss_gradient = [&](int64_t, const at::Tensor& loss) { return loss_gradient(loss); };
  callbacks.before_backward = [&](int64_t micro_batch, int chunk) {
    if (fully_sharded_) fully_sharded_->begin();
    if (micro_batch < present) {
      begin_leaf(chunk, leaves[micro_batch]);
    } else {
      absent_backward(chunk);
    }
  };
  callbacks.after_backward = [&](int64_t micro_batch, int chunk) {
    if (micro_batch < present) end_leaf(chunk);
    if (fully_sharded_) fully_sharded_->end();
  };
  callbacks.observe = recorder_of_actions(tracks_.lanes[0]);
  const auto losses = runner_->run(schedule(micro_batches), callbacks);
  for (size_t i = 0; i < std::min(losses.size(), leaves.size()) && tells_loss(); ++i)
    add_loss(report, {losses[i], correct[i]});
}

const PipelineSchedule& ParallelModel::schedule(int64_t micro_batches) {
  if (schedule_.num_micro_batches != micro_batches || schedule_.stages.empty()) {
    schedule_ =
        make_schedule(options_.pipeline_schedule, options_.mesh.pipeline, options_.pipeline_chunks, micro_batches);
    validate(schedule_);
  }
  return schedule_;
}

void ParallelModel::absent_forward(int part) {
  if (fully_sharded_) fully_sharded_->absent_forward(part);
}

void ParallelModel::absent_backward(int part) {
  const auto exchange = [&](size_t unit) { sharded_reducer_->absent_unit(unit); };
  if (fully_sharded_) fully_sharded_->absent_backward(part, exchange);
  sharded_reducer_->absent_leaf(part);
}

// What several ranks hold terms of beyond the data axis: each context rank those of its tokens, and with tensor
// parallelism whatever is replicated where activations are not.
void ParallelModel::join_terms() {
  join_terms(*sync_);
  if (expert_sync_) join_terms(*expert_sync_);
}

void ParallelModel::join_terms(GradientSync& sync) {
  const metrics::TraceSpan span(tracks_.collectives, "join terms", "collective");
  const Milliseconds timeout = options_.runtime.collective_timeout;
  const auto all_of = [](const ProcessGroup& group) {
    std::vector<int> ranks(group.size());
    std::iota(ranks.begin(), ranks.end(), 0);
    return ranks;
  };
  sum_in_rank_order(mesh_.context(), all_of(mesh_.context()), sync.pieces(GradientSync::kAll), timeout);
  if (!is_planted(Plant::kPartialNotSummed))
    sum_in_rank_order(mesh_.tensor(), all_of(mesh_.tensor()), sync.pieces(1), timeout);
  for (const ModelParameter& parameter : table_.locals()) {
    const ParameterPlacement& placement = parameter.placement;
    if (!placement.is_partial || placement.tensor_dim < 0 || placement.is_of_experts()) continue;
    std::vector<int> holders;
    for (int rank : all_of(mesh_.tensor())) {
      if (placement.part(rank) == placement.part()) holders.push_back(rank);
    }
    sum_in_rank_order(mesh_.tensor(), holders, sync.pieces(2), timeout);
    break;  // heads are shared alike in all layers
  }
}

// A weight with one use on this stage and the other elsewhere: both get the sum of both. Stages go through their
// weights in one order.
void ParallelModel::join_tied() {
  if (is_planted(Plant::kMissingTiedSum)) return;
  const metrics::TraceSpan span(tracks_.collectives, "join tied weights", "collective");
  std::map<std::string, size_t> tied_away;
  for (size_t k = 0; k < table_.trainable().size(); ++k) {
    const ModelParameter& parameter = table_.locals()[table_.trainable()[k]];
    if (parameter.is_tied_away) tied_away[parameter.own_name] = k;
  }
  for (const auto& [own_name, k] : tied_away) {
    const auto& stages = table_.stages_of(own_name);
    const int here = mesh_.pipeline().rank(), there = stages.front() == here ? stages.back() : stages.front();
    const at::Tensor piece = places_[k].sync->piece_of(places_[k].index), none;
    const bool is_first = table_.locals()[table_.trainable()[k]].name == own_name;
    sum_tied_gradients(mesh_.pipeline(), is_first ? here : there, is_first ? there : here, is_first ? piece : none,
                       is_first ? none : piece, options_.runtime.collective_timeout);
  }
}

// Where ranks share experts, one without a micro-batch of its own in the last round repeats one, for nothing: the
// others' tokens want its experts.
StepReport ParallelModel::evaluate(int64_t count, const std::function<data::Batch(int64_t)>& get) {
  const int64_t ranks = mesh_.data().size(), rounds = (count + ranks - 1) / ranks;
  const torch::NoGradGuard no_grad;
  for (const auto& model : models_) model->eval();
  nn::begin_step();
  if (updated_) updated_->finish();
  StepReport report;
  const auto number_in = [&](int64_t round) { return round * ranks + mesh_.data().rank(); };
  if (is_pipelined()) {
    report = evaluate_in_stages(rounds, count, get);
  } else {
    std::vector<StepReport> reports(lanes_.size());
    std::atomic<int64_t> next{0};
    lanes_.run([&](int lane) {
      const torch::NoGradGuard on_this_thread;
      for (int64_t round = next++; round < rounds; round = next++) {
        if (fully_sharded_) fully_sharded_->begin();
        const bool is_own = number_in(round) < count;
        if (is_own || mesh_.experts()) {
          const Scope scope(*this, /*step=*/0, number_in(round));
          const data::Batch batch = on_device(get(std::min(number_in(round), count - 1)));
          const LossSum loss = task_.loss(*models_[lane], batch);
          if (is_own && tells_loss()) add_loss(reports[lane], loss);
          if (is_own && counts_batches()) reports[lane].count += task_.count(batch);
        } else {
          absent_forward(0);
        }
        if (fully_sharded_) fully_sharded_->end();
      }
    });
    for (const StepReport& part : reports) report.merge(part);
  }
  if (fully_sharded_) fully_sharded_->end_step();
  return report;
}

StepReport ParallelModel::evaluate_in_stages(int64_t rounds, int64_t count,
                                             const std::function<data::Batch(int64_t)>& get) {
  auto& stack = dynamic_cast<LayerStack&>(*models_[0]);
  const auto number_in = [&](int64_t round) { return round * mesh_.data().size() + mesh_.data().rank(); };
  StepReport report;
  std::vector<at::Tensor> correct(rounds);
  PipelineCallbacks callbacks;
  callbacks.forward = [&](int64_t round, int chunk, const at::Tensor& input) {
    if (fully_sharded_) fully_sharded_->begin();
    at::Tensor output;
    const bool is_own = number_in(round) < count;
    if (is_own || mesh_.experts()) {
      const Scope scope(*this, /*step=*/0, number_in(round));
      const data::Batch batch = on_device(get(std::min(number_in(round), count - 1)));
      const LossSum loss = run_chunk(stack, chunk, input, batch);
      output = loss.sum;
      correct[round] = loss.correct;
      if (is_own && chunk == 0 && counts_batches()) report.count += task_.count(batch);
    } else {
      absent_forward(chunk);
      output = input.defined() ? input : at::zeros({}, device_);
    }
    if (fully_sharded_) fully_sharded_->end();
    return output;
  };
  const auto losses =
      runner_->run(forward_only_schedule(options_.mesh.pipeline, options_.pipeline_chunks, rounds), callbacks);
  for (size_t i = 0; i < losses.size(); ++i) {
    if (number_in(static_cast<int64_t>(i)) < count && tells_loss()) add_loss(report, {losses[i], correct[i]});
  }
  return report;
}

data::Batch ParallelModel::on_device(const data::Batch& batch) const {
  if (device_.is_cpu()) return batch;
  data::Batch moved{{}, batch.valid_samples};
  for (const auto& tensor : batch.tensors) moved.tensors.push_back(tensor.to(device_, /*non_blocking=*/true));
  return moved;
}

}  // namespace lockstep::train
