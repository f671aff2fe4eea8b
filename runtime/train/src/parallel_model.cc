#include "parallel_model.h"

#include <atomic>
#include <map>
#include <optional>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/torch.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/gradient_reducer.h>

namespace lockstep::train {
namespace {

constexpr int64_t kGatherBytes = int64_t{25} << 20;  // parameters gathered together after an update

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

void share_storage(const std::vector<at::Tensor>& from, const std::vector<at::Tensor>& to) {
  for (size_t i = 0; i < to.size(); ++i) to[i].set_data(from[i].detach());
}

}  // namespace

// What a unit's call means on this rank.
class ParallelModel::Runner : public UnitRuntime {
 public:
  explicit Runner(FullySharded* sharded) : sharded_(sharded) {}

  at::Tensor call(size_t unit, const std::function<at::Tensor()>& body) override {
    if (!sharded_) return body();
    sharded_->before_forward(unit);
    at::Tensor y = body();
    sharded_->after_forward(unit);
    if (y.requires_grad()) y.register_hook([this, unit](const at::Tensor&) { sharded_->before_backward(unit); });
    return y;
  }

 private:
  FullySharded* sharded_;
};

// What holds while a micro-batch computes.
struct ParallelModel::Scope {
  Scope(const Options& options, int64_t step, int64_t leaf)
      : randomness({options.seed, static_cast<uint64_t>(step), static_cast<uint64_t>(leaf)}) {
    // Weights that come and go have no place where a copy could be known by.
    if (options.zero_stage < 3) share_casts.emplace();
  }
  nn::StepScope randomness;
  std::optional<nn::WeightCacheScope> share_casts;
};

ParallelModel::ParallelModel(const Mesh& mesh, at::Device device, Task& task, const Options& options, LanePool& lanes)
    : mesh_(mesh), device_(device), task_(task), options_(options), lanes_(lanes) {
  build();
  build_sync();
  build_optimizer();
}

ParallelModel::~ParallelModel() = default;

void ParallelModel::build() {
  for (int lane = 0; lane < lanes_.size(); ++lane) {
    std::optional<WithoutStorage> without_storage;
    if (options_.zero_stage == 3) without_storage.emplace();
    models_.push_back(task_.make_model());
    if (auto* stack = dynamic_cast<LayerStack*>(models_.back().get())) stack->build();
    if (lane == 0) {
      if (!device_.is_cpu()) models_[0]->to(device_);
    } else {
      share_storage(models_[0]->parameters(), models_[lane]->parameters());
      share_storage(models_[0]->buffers(), models_[lane]->buffers());
    }
  }
  table_ = ParameterTable(*models_[0], mesh_);
  if (table_.trainable().empty())
    throw ConfigError("the model of task " + task_.name() + " has no parameter that requires a gradient");

  const int shards = options_.num_shards(), rank = mesh_.data().rank();
  if (shards > 1) shard_group_ = mesh_.data().split(rank / shards, rank, "shard");
  if (options_.zero_stage == 3) {
    std::vector<ShardedUnit> units;
    for (const FoundUnit& found : table_.units()) units.push_back({found.name, {}, found.unit == nullptr});
    for (const ModelParameter& parameter : table_.locals())
      units[parameter.unit].parameters.push_back(parameter.tensor);
    gather_group_ = mesh_.data().split(rank / shards, rank, "gather");
    fully_sharded_ =
        std::make_unique<FullySharded>(*gather_group_, std::move(units), options_.runtime.collective_timeout);
  }
  for (const auto& model : models_) {
    runners_.push_back(std::make_unique<Runner>(fully_sharded_.get()));
    const auto units = find_units(*model);
    for (size_t number = 0; number < units.size(); ++number) {
      if (units[number].unit) units[number].unit->bind(runners_.back().get(), number);
    }
  }
}

void ParallelModel::build_sync() {
  std::vector<NamedParameter> named;
  std::vector<int64_t> number(table_.locals().size(), -1);
  for (const size_t i : table_.trainable()) {
    const ModelParameter& parameter = table_.locals()[i];
    number[i] = static_cast<int64_t>(named.size());
    named.push_back({.name = parameter.name,
                     .tensor = parameter.tensor,
                     .first_use = parameter.first_use < 0 ? -1 : number[parameter.first_use],
                     .is_tied_away = parameter.is_tied_away,
                     .is_counted = !parameter.is_tied_away || parameter.name == parameter.own_name});
  }
  if (options_.zero_stage >= 2) {
    auto reducer =
        std::make_unique<ShardedReducer>(mesh_.data(), std::move(named),
                                         ShardedReducerOptions{.num_leaves = options_.num_leaves(),
                                                               .num_shards = options_.num_shards(),
                                                               .units = table_.trainable_by_unit(),
                                                               .on_unit_done =
                                                                   [this](size_t unit) {
                                                                     if (fully_sharded_)
                                                                       fully_sharded_->after_backward(unit);
                                                                   },
                                                               .timeout = options_.runtime.collective_timeout});
    sharded_reducer_ = reducer.get();
    sync_ = std::move(reducer);
  } else {
    sync_ = std::make_unique<GradientReducer>(
        mesh_.data(), std::move(named),
        GradientReducerOptions{.num_leaves = options_.num_leaves(),
                               .num_shards = options_.num_shards(),
                               .bucket_bytes = options_.bucket_bytes,
                               .reduction = options_.reduction == "fast" ? Reduction::kFast : Reduction::kOrdered,
                               .timeout = options_.runtime.collective_timeout});
  }
  for (const auto& model : models_) {
    const auto parameters = model->named_parameters();
    std::vector<at::Tensor> tensors;
    for (const size_t i : table_.trainable()) tensors.push_back(parameters[table_.locals()[i].name]);
    sync_->attach_lane(tensors);
  }
}

// This rank's rows of a parameter where it is sharded, else all of it.
at::Tensor ParallelModel::local_part(size_t i) const {
  const ModelParameter& parameter = table_.locals()[i];
  return fully_sharded_ ? fully_sharded_->shard(parameter.unit, parameter.place_in_unit) : parameter.tensor.detach();
}

void ParallelModel::build_optimizer() {
  optimizer_ = task_.make_optimizer(options_.weight_decay);
  const int shards = options_.num_shards(), shard = mesh_.data().rank() % shards;
  std::vector<optim::LocalParameter> parts;
  std::vector<at::Tensor> together;
  int64_t bytes = 0;
  const auto close = [&] {
    if (together.empty()) return;
    ParameterGather gather(*shard_group_, together, options_.runtime.collective_timeout);
    gathers_.push_back({std::exchange(together, {}), std::move(gather)});
    bytes = 0;
  };
  for (size_t k = 0; k < table_.trainable().size(); ++k) {
    const size_t i = table_.trainable()[k];
    const ModelParameter& parameter = table_.locals()[i];
    if (parameter.first_use >= 0) continue;
    const bool is_cut = shards > 1 && !fully_sharded_;
    at::Tensor part = is_cut ? shard_of(parameter.tensor.detach(), shard, shards) : local_part(i);
    parts.push_back({parameter.own_name, part, sync_->grad(k), task_.decays(parameter.own_name, parameter.tensor)});
    if (!is_cut) continue;
    together.push_back(parameter.tensor.detach());
    bytes += static_cast<int64_t>(parameter.tensor.nbytes());
    if (bytes >= kGatherBytes) close();
  }
  close();
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
    if (!fully_sharded_) {
      if (parameter.first_use < 0) task_.initialize(parameter.own_name, parameter.tensor.detach(), seed);
      continue;
    }
    const at::Tensor whole = at::empty(parameter.tensor.sizes(), parameter.tensor.options().requires_grad(false));
    task_.initialize(parameter.own_name, whole, seed);  // one at a time, for a moment
    local_part(i).copy_(shard_of(whole, shard, shards));
  }
}

std::vector<checkpoint::StateTensor> ParallelModel::state() {
  const MeshShape& shape = mesh_.shape();
  const int world = mesh_.world().size(), per_stage = world / shape.pipeline, shards = options_.num_shards();
  // The box of a tensor on each rank: none on other stages, its shard's rows where it is sharded.
  const auto layout = [&](const GlobalTensor& tensor, bool is_sharded) {
    ShardLayout layout{tensor.name, tensor.shape, tensor.dtype, {}};
    for (int rank = 0; rank < world; ++rank) {
      Box box = Box::whole(tensor.shape);
      const int data = rank % per_stage / (shape.context * shape.tensor);
      const bool holds = std::find(tensor.stages.begin(), tensor.stages.end(), rank / per_stage) != tensor.stages.end();
      if (!tensor.shape.empty()) {
        const RowRange rows = row_range(tensor.shape[0], data % shards, shards);
        if (is_sharded) box.offsets[0] = rows.begin, box.sizes[0] = rows.count;
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
      state.push_back({kind, layout(tensor, shards > 1), found == optimizer_state.end() ? nothing : found->second});
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

StepReport ParallelModel::compute(int64_t step, int64_t divisor, const std::vector<data::Batch>& batches) {
  const auto leaves = sync_->leaves();
  std::vector<LossSum> losses(batches.size());
  const double weight = 1.0 / static_cast<double>(divisor);
  nn::begin_step();
  sync_->begin_step();
  if (sharded_reducer_) {
    for (size_t i = 0; i < static_cast<size_t>(sharded_reducer_->num_rounds()); ++i) {
      if (fully_sharded_ && i < leaves.size()) fully_sharded_->begin(/*with_backward=*/true);
      if (i < leaves.size()) compute_leaf(0, step, weight, leaves[i], batches[i], losses[i]);
      if (fully_sharded_ && i < leaves.size()) fully_sharded_->end();
      if (fully_sharded_ && i >= leaves.size())
        fully_sharded_->absent(/*with_backward=*/true, [&](size_t unit) { sharded_reducer_->absent_unit(unit); });
      if (i >= leaves.size()) sharded_reducer_->absent_leaf();
    }
  } else {
    std::atomic<size_t> next{0};
    lanes_.run([&](int lane) {
      for (size_t i = next++; i < batches.size(); i = next++)
        compute_leaf(lane, step, weight, leaves[i], batches[i], losses[i]);
    });
  }
  if (fully_sharded_) fully_sharded_->end_step();
  first_step_ = false;
  sync_->fold();
  return report_of(losses);
}

void ParallelModel::compute_leaf(int lane, int64_t step, double weight, int64_t leaf, const data::Batch& host_batch,
                                 LossSum& loss) {
  auto& model = *models_[lane];
  const Scope scope(options_, step, leaf);
  const data::Batch batch = on_device(host_batch);
  model.train();
  sync_->begin_leaf(lane, leaf);
  const auto versions = first_step_ ? buffer_versions(model) : std::vector<uint32_t>();
  {
    const nn::AutocastGuard autocast(device_.type(), options_.precision == "bf16");
    loss = task_.loss(model, batch);
  }
  if (first_step_) refuse_written_buffers(model, versions);
  // The loss is a sum; its gradient carries the divisor, the same on every rank.
  torch::autograd::backward({loss.sum},
                            {at::full({}, static_cast<float>(weight), loss.sum.options().requires_grad(false))});
  sync_->end_leaf(lane);
  loss = {loss.sum.detach(), loss.correct.defined() ? loss.correct.detach() : at::Tensor()};
}

StepReport ParallelModel::report_of(const std::vector<LossSum>& losses) {
  StepReport report;
  report.squares = sync_->publish();
  for (const LossSum& leaf : losses) {
    report.loss.add(leaf.sum.item<float>());
    report.has_correct |= leaf.correct.defined();
    if (leaf.correct.defined()) report.correct.add(leaf.correct.item<double>());
  }
  return report;
}

void ParallelModel::update(const optim::StepScalars& scalars) {
  sync_->wait();
  lanes_.run([&](int lane) { optimizer_->step(scalars, lane, lanes_.size()); });
  for (Gather& gather : gathers_) gather.gather.start_from(gather.parameters);
  for (Gather& gather : gathers_) gather.gather.finish(gather.parameters, /*skip_own=*/true);
  loaded();
}

void ParallelModel::drop_gradients() { sync_->wait(); }

std::string ParallelModel::name_of_non_finite_gradient() const {
  for (size_t k = 0; k < table_.trainable().size(); ++k) {
    const at::Tensor& grad = sync_->grad(k);
    if (grad.defined() && !grad.isfinite().all().item<bool>()) return table_.locals()[table_.trainable()[k]].name;
  }
  return "";
}

StepReport ParallelModel::evaluate(int64_t count, const std::function<data::Batch(int64_t)>& get) {
  const int64_t ranks = mesh_.data().size(), rounds = (count + ranks - 1) / ranks;
  std::vector<StepReport> reports(lanes_.size());
  std::atomic<int64_t> next{0};
  nn::begin_step();
  lanes_.run([&](int lane) {
    const torch::NoGradGuard no_grad;
    const nn::AutocastGuard autocast(device_.type(), options_.precision == "bf16");
    auto& model = *models_[lane];
    model.eval();
    for (int64_t round = next++; round < rounds; round = next++) {
      const int64_t number = round * ranks + mesh_.data().rank();
      if (fully_sharded_ && number >= count) fully_sharded_->absent(/*with_backward=*/false);
      if (number >= count) continue;
      if (fully_sharded_) fully_sharded_->begin(/*with_backward=*/false);
      const Scope scope(options_, /*step=*/0, number);
      const data::Batch batch = on_device(get(number));
      const LossSum loss = task_.loss(model, batch);
      if (fully_sharded_) fully_sharded_->end();
      StepReport& report = reports[lane];
      report.loss.add(loss.sum.item<float>());
      report.count += task_.count(batch);
      report.has_correct |= loss.correct.defined();
      if (loss.correct.defined()) report.correct.add(loss.correct.item<double>());
    }
  });
  if (fully_sharded_) fully_sharded_->end_step();
  StepReport report;
  for (const StepReport& part : reports) report.merge(part);
  return report;
}

std::shared_ptr<torch::nn::Module> ParallelModel::whole() const {
  return fully_sharded_ || mesh_.shape().pipeline > 1 ? nullptr : models_[0];
}

data::Batch ParallelModel::on_device(const data::Batch& batch) const {
  if (device_.is_cpu()) return batch;
  data::Batch moved{{}, batch.valid_samples};
  for (const auto& tensor : batch.tensors) moved.tensors.push_back(tensor.to(device_, /*non_blocking=*/true));
  return moved;
}

}  // namespace lockstep::train
