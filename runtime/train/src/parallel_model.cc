#include "parallel_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

#include <ATen/ops/empty.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/gradient_reducer.h>
#include <lockstep/sharding/layer_split.h>
#include <lockstep/sharding/mixture_of_experts.h>

namespace lockstep::train {
namespace {

void share_storage(const std::vector<at::Tensor>& from, const std::vector<at::Tensor>& to) {
  for (size_t i = 0; i < to.size(); ++i) to[i].set_data(from[i].detach());
}

// What shares memory shares it there too; what has none, as for who gets its shards, gets none.
void move_to(torch::nn::Module& model, at::Device device) {
  std::map<const c10::StorageImpl*, at::Tensor> moved;
  std::vector<at::Tensor> tensors = model.parameters();
  for (const at::Tensor& buffer : model.buffers()) tensors.push_back(buffer);
  for (at::Tensor& tensor : tensors) {
    at::Tensor& there = moved[tensor.storage().unsafeGetStorageImpl()];
    if (!there.defined()) {
      there = at::empty(tensor.sizes(), tensor.options().device(device).requires_grad(false));
      if (tensor.storage().nbytes() > 0) {
        there.copy_(tensor.detach());
      } else {
        there.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(at::DataPtr(nullptr, device));
        there.storage().unsafeGetStorageImpl()->set_nbytes(0);
      }
    }
    tensor.set_data(there);
  }
}

// Replicated over the whole tensor group, or held by those that have the same part: two sums.
int partial_kind(const ParameterPlacement& placement) {
  return !placement.is_partial ? 0 : placement.tensor_dim < 0 || placement.is_of_experts() ? 1 : 2;
}

std::vector<metrics::TraceTrack> lane_tracks(metrics::Trace* trace, int lanes) {
  std::vector<metrics::TraceTrack> tracks;
  tracks.reserve(lanes);
  for (int lane = 0; lane < lanes; ++lane)
    tracks.emplace_back(trace, lane == 0 ? "compute" : "compute, lane " + std::to_string(lane));
  return tracks;
}

}  // namespace

// What a unit's call means on this rank.
class ParallelModel::Runner : public UnitRuntime {
 public:
  Runner(ParallelModel& model, Recompute recompute)
      : sharded_(model.fully_sharded_.get()),
        updated_(model.updated_),
        num_owners_(model.table_.units().size()),
        recompute_(recompute) {}

  at::Tensor call(size_t unit, const std::function<at::Tensor()>& body) override {
    if (unit >= num_owners_) return recompute(recompute_, body);  // all it has is shared
    if (updated_) updated_->require(unit);
    if (!sharded_) return recompute(recompute_, body);
    sharded_->before_forward(unit);
    at::Tensor y = recompute(recompute_, body);  // run again in backward, while the unit is there for its gradients
    sharded_->after_forward(unit);
    if (y.requires_grad()) y.register_hook([this, unit](const at::Tensor&) { sharded_->before_backward(unit); });
    return y;
  }

 private:
  FullySharded* sharded_;
  const std::unique_ptr<LateGather>& updated_;  // made after this
  size_t num_owners_;                           // of parameters: units before this number
  Recompute recompute_;
};

ParallelModel::ParallelModel(const Mesh& mesh, at::Device device, Task& task, const Options& options, LanePool& lanes,
                             metrics::Trace* trace)
    : mesh_(mesh),
      device_(device),
      task_(task),
      options_(options),
      lanes_(lanes),
      tracks_{lane_tracks(trace, lanes.size()),
              {trace, "gradient collectives"},
              {trace, "parameter gathers"},
              {trace, "optimizer"}},
      parallel_{{&mesh.tensor(), options.sequence_parallel, options.runtime.collective_timeout, tracks_.lanes[0]},
                {&mesh.context(), options.runtime.collective_timeout, tracks_.lanes[0]},
                {mesh.experts(), options.runtime.collective_timeout, tracks_.lanes[0]}} {
  build();
  build_sync();
  build_optimizer();
}

ParallelModel::~ParallelModel() = default;

void ParallelModel::build() {
  for (int lane = 0; lane < lanes_.size(); ++lane) {
    std::optional<WithoutStorage> without_storage;
    if (options_.zero_stage == 3 || lane > 0) without_storage.emplace();  // it will have lane 0's
    const nn::MemoryScope memory(nn::MemoryKind::kParameters);
    models_.push_back(task_.make_model(parallel_));
    if (auto* stack = dynamic_cast<LayerStack*>(models_.back().get())) {
      stack->build(chunks_of(*stack));
    } else if (options_.mesh.pipeline > 1) {
      throw ConfigError("the model of task " + task_.name() +
                        " is no LayerStack, so no pipeline can cut it. Mend: --pipeline_parallel_size=1");
    }
    if (lane == 0) {
      if (!device_.is_cpu()) move_to(*models_[0], device_);
    } else {
      share_storage(models_[0]->parameters(), models_[lane]->parameters());
      share_storage(models_[0]->buffers(), models_[lane]->buffers());
    }
  }
  table_ = ParameterTable(*models_[0], mesh_, parallel_.tensor);
  if (num_parameters() == 0)
    throw ConfigError("the model of task " + task_.name() + " has no parameter that requires a gradient");
  if (mesh_.experts() && std::none_of(table_.globals().begin(), table_.globals().end(),
                                      [](const GlobalTensor& tensor) { return tensor.is_of_experts; })) {
    throw ConfigError("the model of task " + task_.name() + " has no experts. Mend: --expert_parallel_size=1");
  }
  if (is_pipelined())
    runner_ = std::make_unique<PipelineRunner>(
        mesh_.pipeline(), PipelineRunnerOptions{.device = device_, .timeout = options_.runtime.collective_timeout});

  const int shards = options_.num_shards(), rank = mesh_.data().rank();
  if (shards > 1) shard_group_ = mesh_.data().split(rank / shards, rank, "shard");
  if (const auto [count, shard] = sharding(true, rank); mesh_.experts() && count > 1) {
    ProcessGroup& replicas = *mesh_.expert_replicas();
    expert_shard_group_ = replicas.split(replicas.rank() / count, shard, "expert shard");
  }
  if (options_.zero_stage == 3) {
    std::vector<ShardedUnit> units;
    for (const FoundUnit& found : table_.units())
      units.push_back({found.name, {}, part_of(found), found.unit == nullptr});
    for (const ModelParameter& parameter : table_.locals())
      units[parameter.unit].parameters.push_back(parameter.tensor);
    gather_group_ = mesh_.data().split(rank / shards, rank, "gather");
    fully_sharded_ = std::make_unique<FullySharded>(*gather_group_, std::move(units),
                                                    options_.runtime.collective_timeout, tracks_.gathers);
  }
  for (const auto& model : models_) {
    runners_.push_back(std::make_unique<Runner>(*this, options_.recompute));
    const auto units = find_units(*model);
    for (size_t number = 0; number < units.size(); ++number) {
      if (units[number].unit) units[number].unit->bind(runners_.back().get(), number);
    }
  }
}

// The layers of this rank's stage, chunk by chunk.
std::vector<LayerStack::Range> ParallelModel::chunks_of(const LayerStack& stack) const {
  const int stages = options_.mesh.pipeline, positions = stages * options_.pipeline_chunks;
  const LayerSplit split =
      options_.pipeline_split.empty()
          ? split_layers(stack.costs(), positions)
          : parse_layer_split(options_.pipeline_split, static_cast<int64_t>(stack.num_layers()), positions);
  std::vector<LayerStack::Range> chunks;
  for (int chunk = 0; chunk < options_.pipeline_chunks; ++chunk) {
    const LayerRange range = layers_of_part(split, chunk * stages + mesh_.pipeline().rank());
    chunks.push_back({static_cast<size_t>(range.begin), static_cast<size_t>(range.end)});
  }
  return chunks;
}

// The chunk that a unit belongs to.
size_t ParallelModel::part_of(const FoundUnit& unit) const {
  const auto* stack = dynamic_cast<const LayerStack*>(models_[0].get());
  return stack && unit.unit ? stack->chunk_of(unit.name) : 0;
}

// In the norm: of the copies of a parameter on several ranks, one.
bool ParallelModel::is_counted(const ModelParameter& parameter) const {
  const bool is_first_copy = parameter.placement.is_first_holder() || is_planted(Plant::kReplicaCountedTwice);
  const bool is_first_use = !parameter.is_tied_away || parameter.name == parameter.own_name;
  return is_first_copy && (is_first_use || is_planted(Plant::kTiedCountedTwice));
}

void ParallelModel::build_sync() {
  std::vector<NamedParameter> dense, of_experts;
  std::vector<int64_t> number(table_.locals().size(), -1);
  for (const size_t i : table_.trainable()) {
    const ModelParameter& parameter = table_.locals()[i];
    auto& named = parameter.placement.is_of_experts() ? of_experts : dense;
    number[i] = static_cast<int64_t>(named.size());
    named.push_back({.name = parameter.name,
                     .tensor = parameter.tensor,
                     .first_use = parameter.first_use < 0 ? -1 : number[parameter.first_use],
                     .is_tied_away = parameter.is_tied_away,
                     .is_counted = is_counted(parameter),
                     .partial_kind = partial_kind(parameter.placement)});
  }
  std::vector<size_t> parts;
  for (const FoundUnit& unit : table_.units()) parts.push_back(part_of(unit));
  if (options_.zero_stage >= 2) {
    // What is left of the backward of such a unit may still read them when its last gradient is there.
    std::vector<bool> has_frozen(table_.units().size());
    for (const ModelParameter& parameter : table_.locals()) {
      if (!parameter.is_trainable) has_frozen[parameter.unit] = true;
    }
    auto reducer = std::make_unique<ShardedReducer>(
        mesh_.data(), std::move(dense),
        ShardedReducerOptions{.num_leaves = options_.num_leaves(),
                              .num_shards = options_.num_shards(),
                              .units = table_.trainable_by_unit(),
                              .parts = parts,
                              .on_unit_done =
                                  [this, has_frozen](size_t unit) {
                                    if (fully_sharded_) fully_sharded_->after_backward(unit, has_frozen[unit]);
                                  },
                              .timeout = options_.runtime.collective_timeout,
                              .track = tracks_.collectives});
    sharded_reducer_ = reducer.get();
    sync_ = std::move(reducer);
  } else {
    const auto reducer = [&](ProcessGroup& group, std::vector<NamedParameter> named, int num_shards) {
      return std::make_unique<GradientReducer>(
          group, std::move(named),
          GradientReducerOptions{.num_leaves = options_.num_leaves(),
                                 .num_shards = num_shards,
                                 .bucket_bytes = options_.bucket_bytes,
                                 .reduction = options_.reduction == "fast" ? Reduction::kFast : Reduction::kOrdered,
                                 .has_terms_beyond_group = options_.mesh.context * options_.mesh.tensor > 1,
                                 .timeout = options_.runtime.collective_timeout,
                                 .track = tracks_.collectives});
    };
    sync_ = reducer(mesh_.data(), std::move(dense), options_.num_shards());
    // The leaves of a rank's expert group are neighbours: the share of one rank among as many as there are groups.
    if (!of_experts.empty())
      expert_sync_ = reducer(*mesh_.expert_replicas(), std::move(of_experts), sharding(true, 0).first);
  }
  size_t dense_index = 0, expert_index = 0;
  for (const size_t i : table_.trainable()) {
    const bool is_of_experts = table_.locals()[i].placement.is_of_experts();
    places_.push_back({(is_of_experts ? expert_sync_ : sync_).get(), (is_of_experts ? expert_index : dense_index)++});
  }
  attach_lanes(parts);
}

void ParallelModel::attach_lanes(const std::vector<size_t>& parts) {
  for (const auto& model : models_) {
    const auto parameters = model->named_parameters();
    for (size_t part = 0; part < static_cast<size_t>(options_.pipeline_chunks); ++part) {  // a pipeline has one model
      std::vector<at::Tensor> tensors;
      for (const size_t i : table_.trainable()) {
        const ModelParameter& parameter = table_.locals()[i];
        if (parameter.placement.is_of_experts()) continue;
        tensors.push_back(parts[parameter.unit] == part ? parameters[parameter.name] : at::Tensor());
      }
      sync_->attach_lane(tensors);
    }
  }
  if (!expert_sync_) return;
  const auto uses = expert_uses(*models_[0]);  // there is one lane: exchanges of tokens need one order
  for (size_t part = 0; part < static_cast<size_t>(options_.pipeline_chunks); ++part) {
    for (int source = 0; source < mesh_.experts()->size(); ++source) {
      std::vector<at::Tensor> tensors;
      for (const size_t i : table_.trainable()) {
        const ModelParameter& parameter = table_.locals()[i];
        if (!parameter.placement.is_of_experts()) continue;
        tensors.push_back(parts[parameter.unit] == part ? uses.at(parameter.name)[source] : at::Tensor());
      }
      expert_sync_->attach_lane(tensors);
    }
  }
}

std::pair<int, int> ParallelModel::sharding(bool is_of_experts, int data_rank) const {
  const int shared_by = is_of_experts ? options_.mesh.expert : 1;
  const int count = std::max(1, options_.num_shards() / shared_by);
  return {count, data_rank / shared_by % count};
}

// This rank's rows of a parameter where it is sharded, else all of it.
at::Tensor ParallelModel::local_part(size_t i) const {
  const ModelParameter& parameter = table_.locals()[i];
  return fully_sharded_ ? fully_sharded_->shard(parameter.unit, parameter.place_in_unit) : parameter.tensor.detach();
}

void ParallelModel::build_optimizer() {
  optimizer_ = task_.make_optimizer(options_.weight_decay);
  std::vector<optim::LocalParameter> parts;
  for (const bool of_experts : {false, true}) {
    const auto [shards, shard] = sharding(of_experts, mesh_.data().rank());
    std::vector<LateGather::Parameter> cut;
    for (size_t k = 0; k < table_.trainable().size(); ++k) {
      const size_t i = table_.trainable()[k];
      const ModelParameter& parameter = table_.locals()[i];
      if (parameter.first_use >= 0 || parameter.placement.is_of_experts() != of_experts) continue;
      const bool is_cut = shards > 1 && !fully_sharded_;
      at::Tensor part = is_cut ? shard_of(parameter.tensor.detach(), shard, shards) : local_part(i);
      if (is_planted(Plant::kShardOffByOneRow) && is_cut && shard == 0 && part.numel() < parameter.tensor.numel())
        part = parameter.tensor.detach().narrow(0, 1, part.size(0));
      parts.push_back({parameter.own_name, part, grad(k), task_.decays(parameter.own_name, parameter.tensor)});
      if (is_cut) cut.push_back({parameter.unit, parameter.tensor.detach()});
    }
    if (cut.empty()) continue;
    (of_experts ? updated_experts_ : updated_) =
        std::make_unique<LateGather>(of_experts ? *expert_shard_group_ : *shard_group_, cut, table_.units().size(),
                                     options_.bucket_bytes, options_.runtime.collective_timeout, tracks_.gathers);
  }
  const nn::MemoryScope memory(nn::MemoryKind::kOptimizer);
  optimizer_->attach(std::move(parts));
}

int64_t ParallelModel::num_parameters() const {
  int64_t numel = 0;
  for (const GlobalTensor& tensor : table_.globals()) {
    if (tensor.is_trainable) numel += Box::whole(tensor.shape).numel();
  }
  return numel;
}

void ParallelModel::initialize(uint64_t seed) {
  const int shards = options_.num_shards(), shard = mesh_.data().rank() % shards;
  for (size_t i = 0; i < table_.locals().size(); ++i) {
    const ModelParameter& parameter = table_.locals()[i];
    const auto fill = [&](const at::Tensor& whole) { task_.initialize(parameter.own_name, whole, seed); };
    if (!fully_sharded_ && parameter.first_use >= 0) continue;
    const nn::MemoryScope memory(nn::MemoryKind::kParameters);
    const bool is_cut = fully_sharded_ && parameter.tensor.dim() > 0;
    const at::Tensor part = local_part(i).detach();
    if (fully_sharded_) part.fill_(std::numeric_limits<double>::quiet_NaN());  // memory that nobody wrote to so far
    fill_part(part, parameter.placement, fill, is_cut ? row_range(parameter.tensor.size(0), shard, shards).begin : 0);
    if (std::isnan(part.sum().item<double>()))
      throw ConfigError("the task's initialize() leaves NaN or nothing in '" + parameter.own_name +
                        "'. Mend: fill every parameter there, for example by nn::fill_constant()");
  }
}

std::vector<checkpoint::StateTensor> ParallelModel::state() {
  if (updated_) updated_->finish();
  const MeshShape& shape = mesh_.shape();
  const int world = mesh_.world().size(), per_stage = world / shape.pipeline;
  // The box of a tensor on each rank: none on other stages, its shard's rows where it is sharded.
  const auto layout = [&](const GlobalTensor& tensor, bool is_sharded) {
    ShardLayout layout{tensor.name, tensor.shape, tensor.dtype, {}};
    for (int rank = 0; rank < world; ++rank) {
      Box box = Box::whole(tensor.shape);
      const int data = rank % per_stage / (shape.context * shape.tensor);
      if (tensor.tensor_dim >= 0) {
        const Part& part = tensor.parts[tensor.is_of_experts ? data % shape.expert : rank % shape.tensor];
        box.offsets[tensor.tensor_dim] = part.begin;
        box.sizes[tensor.tensor_dim] = part.size;
      }
      const bool holds = std::find(tensor.stages.begin(), tensor.stages.end(), rank / per_stage) != tensor.stages.end();
      if (!tensor.shape.empty()) {
        const auto [shards, shard] = sharding(tensor.is_of_experts, data);
        const RowRange rows = row_range(box.sizes[0], shard, shards);
        if (is_sharded) box.offsets[0] += rows.begin, box.sizes[0] = rows.count;
        if (!holds) box.sizes[0] = 0;
      }
      layout.boxes.push_back(std::move(box));
    }
    return layout;
  };
  std::map<std::pair<std::string, std::string>, at::Tensor> optimizer_state;
  for (const auto& part : optimizer_->state()) optimizer_state[{part.kind, part.parameter}] = part.tensor;

  std::vector<checkpoint::StateTensor> state;
  const at::Tensor nothing = at::empty({0}, at::kFloat);
  for (const GlobalTensor& tensor : table_.globals()) {
    const at::Tensor local = tensor.local < 0   ? nothing
                             : tensor.is_buffer ? table_.buffers()[tensor.local]
                                                : local_part(tensor.local);
    state.push_back({tensor.is_buffer ? "buffers" : "weights",
                     layout(tensor, fully_sharded_ != nullptr && !tensor.is_buffer), local});
  }
  for (const std::string& kind : optimizer_->kinds()) {
    for (const GlobalTensor& tensor : table_.globals()) {
      if (!tensor.is_trainable) continue;
      const auto found = optimizer_state.find({kind, tensor.name});
      state.push_back(
          {kind, layout(tensor, options_.num_shards() > 1), found == optimizer_state.end() ? nothing : found->second});
    }
  }
  return state;
}

void ParallelModel::loaded() {
  if (!fully_sharded_) return;
  for (size_t i = 0; i < table_.locals().size(); ++i) {
    const int64_t first = table_.locals()[i].first_use;
    if (first >= 0) local_part(i).copy_(local_part(first));
  }
}

void ParallelModel::update(const optim::StepScalars& scalars) {
  wait_for_gradients();
  {
    const metrics::TraceSpan span(tracks_.optimizer, "optimizer", "step");
    lanes_.run([&](int lane) { optimizer_->step(scalars, lane, lanes_.size()); });
  }
  if (updated_experts_) updated_experts_->start();
  if (updated_experts_) updated_experts_->finish();
  if (updated_) {
    updated_->start();
    // Layers of a stack read no parameters but their own; any other model may, before the unit they are in is called.
    if (!dynamic_cast<LayerStack*>(models_[0].get())) updated_->finish();
  }
  loaded();
}

void ParallelModel::wait_for_gradients() {
  sync_->wait();
  if (expert_sync_) expert_sync_->wait();
}

void ParallelModel::drop_gradients() { wait_for_gradients(); }

std::string ParallelModel::name_of_non_finite_gradient() const {
  for (size_t k = 0; k < table_.trainable().size(); ++k) {
    if (grad(k).defined() && !grad(k).isfinite().all().item<bool>()) return table_.locals()[table_.trainable()[k]].name;
  }
  return "";
}

std::shared_ptr<torch::nn::Module> ParallelModel::whole() const {
  if (updated_) updated_->finish();
  return fully_sharded_ || is_pipelined() || parallel_.is_parallel() ? nullptr : models_[0];
}

}  // namespace lockstep::train
