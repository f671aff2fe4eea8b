#include <cstring>
#include <sstream>

#include <torch/csrc/autograd/variable.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/gradient_sync.h>

namespace lockstep {

// One a parameter and lane. AccumulateGrad has just stored this leaf's gradient: take it, so that the next leaf starts
// undefined.
class GradientHook : public torch::autograd::PostAccumulateGradHook {
 public:
  GradientHook(GradientSync& sync, int lane, size_t parameter) : sync_(sync), lane_(lane), parameter_(parameter) {}
  void operator()(const at::Tensor& parameter) override {
    at::Tensor grad = std::move(parameter.mutable_grad());
    parameter.mutable_grad().reset();
    sync_.take(lane_, parameter_, std::move(grad));
  }

 private:
  GradientSync& sync_;
  int lane_;
  size_t parameter_;
};

GradientSync::GradientSync(ProcessGroup& group, std::vector<NamedParameter> parameters)
    : group_(group),
      parameters_(std::move(parameters)),
      grads_(parameters_.size()),
      stands_alone_(parameters_.size()),
      used_(std::make_unique<std::atomic<bool>[]>(parameters_.size())) {
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const NamedParameter& parameter = parameters_[i];
    LOCKSTEP_CHECK(parameter.tensor.is_contiguous() && parameter.tensor.scalar_type() == at::kFloat)
        << "parameter " << parameter.name
        << " must be contiguous f32; precision is the step's business, not the parameter's";
    if (parameter.is_tied_away) stands_alone_[i] = true;
    if (parameter.first_use >= 0) stands_alone_[i] = stands_alone_[parameter.first_use] = true;
  }
  check_parameters_agree();
}

bool GradientSync::may_share_bucket(size_t a, size_t b) const {
  return !stands_alone_[a] && !stands_alone_[b] && parameters_[a].is_counted == parameters_[b].is_counted &&
         parameters_[a].partial_kind == parameters_[b].partial_kind;
}

std::vector<std::vector<int64_t>> GradientSync::shapes_of(const std::vector<size_t>& members) const {
  std::vector<std::vector<int64_t>> shapes;
  shapes.reserve(members.size());
  for (const size_t i : members) shapes.push_back(parameters_[i].tensor.sizes().vec());
  return shapes;
}

void GradientSync::check_parameters_agree() {
  std::ostringstream mine;
  for (const auto& parameter : parameters_) mine << parameter.name << ' ' << parameter.tensor.sizes() << '\n';
  const uint64_t hash = std::hash<std::string>{}(mine.str());
  const std::string all = all_gather_bytes(group_, std::as_bytes(std::span(&hash, 1)));
  for (int rank = 0; rank < group_.size(); ++rank) {
    uint64_t theirs = 0;
    std::memcpy(&theirs, all.data() + rank * sizeof(theirs), sizeof(theirs));
    if (theirs != hash) {
      throw ConfigError("rank " + std::to_string(rank) + " and rank " + std::to_string(group_.rank()) +
                        " built different models: the names or shapes of their parameters differ. "
                        "Mend: start every rank with the same program and flags.");
    }
  }
}

int GradientSync::attach_lane(const std::vector<at::Tensor>& parameters) {
  LOCKSTEP_CHECK(parameters.size() == parameters_.size())
      << "a lane's model has " << parameters.size() << " parameters, lane 0's has " << parameters_.size();
  const int lane = static_cast<int>(lanes_.size());
  lanes_.push_back(std::make_unique<Lane>());
  lanes_.back()->has.resize(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    lanes_.back()->has[i] = parameters[i].defined();
    if (!parameters[i].defined()) continue;
    torch::autograd::impl::set_post_acc_grad_hooks(parameters[i], std::make_unique<GradientHook>(*this, lane, i));
  }
  return lane;
}

void GradientSync::begin_leaf(int lane, int64_t leaf) {
  LOCKSTEP_CHECK(computes(leaf)) << "leaf " << leaf << " is not one of rank " << group_.rank() << "'s";
  lanes_[lane]->leaf = leaf;
  lanes_[lane]->arrived.assign(parameters_.size(), false);
}

void GradientSync::end_leaf(int lane) {
  for (size_t i = parameters_.size(); i-- > 0;) {
    if (lanes_[lane]->has[i] && !lanes_[lane]->arrived[i]) take(lane, i, at::Tensor());
  }
  lanes_[lane]->leaf = -1;
}

void GradientSync::take(int lane_number, size_t parameter, at::Tensor grad) {
  Lane& lane = *lanes_[lane_number];
  const std::string& name = parameters_[parameter].name;
  LOCKSTEP_CHECK(lane.leaf >= 0) << "gradient of " << name << " arrived outside begin_leaf .. end_leaf";
  LOCKSTEP_CHECK(!lane.arrived[parameter]) << name << " got two gradients in one backward";
  lane.arrived[parameter] = true;
  if (grad.defined()) {
    LOCKSTEP_CHECK(grad.layout() == at::kStrided && grad.scalar_type() == at::kFloat)
        << "gradient of " << name << " is " << grad.toString() << "; dense f32 is needed";
    grad = grad.contiguous();
    used_[parameter].store(true, std::memory_order_relaxed);
  }
  deliver(lane.leaf, parameter, std::move(grad));
}

void GradientSync::check_all_used() {
  std::vector<std::byte> used(parameters_.size());
  for (size_t i = 0; i < used.size(); ++i) used[i] = std::byte{used_[i].load()};
  const std::string all = all_gather_bytes(group_, used);
  std::string unused;
  for (size_t i = 0; i < used.size(); ++i) {
    bool anywhere = false;
    for (int rank = 0; rank < group_.size(); ++rank) anywhere |= all[rank * used.size() + i] != 0;
    if (!anywhere) unused += (unused.empty() ? "" : ", ") + parameters_[i].name;
  }
  if (!unused.empty()) {
    throw ConfigError("no micro-batch of the first step gave a gradient to: " + unused +
                      ". Mend: use them in the loss, or freeze them with requires_grad_(false).");
  }
}

}  // namespace lockstep
