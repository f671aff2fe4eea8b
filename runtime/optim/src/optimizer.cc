#include <algorithm>
#include <cmath>

#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include <lockstep/base/error.h>
#include <lockstep/optim/optimizer.h>

#include "kernels.h"

namespace lockstep::optim {
namespace {

constexpr int64_t kPartMultiple = 1024;  // elements: parts of two lanes stay pages apart

bool is_usable(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_contiguous() && tensor.scalar_type() == at::kFloat;
}

// State beside each parameter, and the cut of all elements into parts.
class FlatOptimizer : public Optimizer {
 public:
  explicit FlatOptimizer(std::vector<std::string> kinds) : kinds_(std::move(kinds)) {}

  void attach(std::vector<LocalParameter> parameters) override {
    parameters_ = std::move(parameters);
    state_.clear();
    for (const auto& [name, parameter, grad, decay] : parameters_) {
      LOCKSTEP_CHECK(is_usable(parameter) && is_usable(grad) && grad.numel() == parameter.numel() &&
                     grad.device() == parameter.device())
          << "optimizer got " << name << " that is not contiguous f32 with a gradient of its size beside it";
      auto& state = state_.emplace_back();
      for (size_t kind = 0; kind < kinds_.size(); ++kind) state.push_back(at::zeros_like(parameter));
    }
  }

  void step(const StepScalars& scalars, int part, int parts) override {
    if (!parameters_.empty() && !parameters_[0].parameter.is_cpu()) {
      if (part == 0) update_on_device(scalars);
      return;
    }
    int64_t total = 0;
    for (const auto& local : parameters_) total += local.parameter.numel();
    const int64_t each = (total / parts + kPartMultiple) / kPartMultiple * kPartMultiple;
    const int64_t begin = std::min(total, part * each), end = part + 1 == parts ? total : std::min(total, begin + each);
    int64_t first = 0;  // of the current parameter, in all elements
    for (size_t i = 0; i < parameters_.size(); first += parameters_[i].parameter.numel(), ++i) {
      const int64_t from = std::max(begin, first) - first,
                    to = std::min(end, first + parameters_[i].parameter.numel()) - first;
      if (from < to) update(i, from, to - from, scalars);
    }
  }

  std::vector<std::string> kinds() const override { return kinds_; }

  std::vector<StateTensor> state() override {
    std::vector<StateTensor> all;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      for (size_t kind = 0; kind < kinds_.size(); ++kind)
        all.push_back({parameters_[i].name, kinds_[kind], state_[i][kind]});
    }
    return all;
  }

 protected:
  virtual void update(size_t i, int64_t offset, int64_t n, const StepScalars& scalars) = 0;
  virtual void update_on_device(const StepScalars& scalars) = 0;  // all of them, by LibTorch's kernels

  std::vector<std::string> kinds_;
  std::vector<LocalParameter> parameters_;
  std::vector<std::vector<at::Tensor>> state_;  // by parameter, then kind
};

class AdamW : public FlatOptimizer {
 public:
  explicit AdamW(AdamWOptions options) : FlatOptimizer({"exp_avg", "exp_avg_sq"}), options_(options) {}

 private:
  void update(size_t i, int64_t offset, int64_t n, const StepScalars& scalars) override {
    const auto& [beta1, beta2, epsilon, weight_decay] = options_;
    const double c1 = 1 - std::pow(beta1, static_cast<double>(scalars.step));
    const double c2 = 1 - std::pow(beta2, static_cast<double>(scalars.step));
    const double decay = parameters_[i].decay ? weight_decay : 0;
    const AdamWConstants constants{.beta1 = static_cast<float>(beta1),
                                   .one_minus_beta1 = static_cast<float>(1 - beta1),
                                   .beta2 = static_cast<float>(beta2),
                                   .one_minus_beta2 = static_cast<float>(1 - beta2),
                                   .grad_scale = static_cast<float>(scalars.grad_scale),
                                   .keep = static_cast<float>(1 - scalars.learning_rate * decay),
                                   .step_size = static_cast<float>(scalars.learning_rate / c1),
                                   .inverse_root_c2 = static_cast<float>(1 / std::sqrt(c2)),
                                   .epsilon = static_cast<float>(epsilon)};
    adamw(parameters_[i].parameter.mutable_data_ptr<float>() + offset,
          parameters_[i].grad.const_data_ptr<float>() + offset, state_[i][0].mutable_data_ptr<float>() + offset,
          state_[i][1].mutable_data_ptr<float>() + offset, n, constants);
  }

  // Whatever decays and whatever does not, each in one call.
  void update_on_device(const StepScalars& scalars) override {
    const auto f32 = parameters_[0].parameter.options().requires_grad(false);
    const at::Tensor step = at::full({}, static_cast<double>(scalars.step), f32),
                     unscale = at::full({}, 1 / scalars.grad_scale, f32);
    for (const bool decays : {true, false}) {
      std::vector<at::Tensor> parameters, grads, exp_avgs, exp_avg_sqs;
      for (size_t i = 0; i < parameters_.size(); ++i) {
        if (parameters_[i].decay != decays || parameters_[i].parameter.numel() == 0) continue;
        parameters.push_back(parameters_[i].parameter);
        grads.push_back(parameters_[i].grad);
        exp_avgs.push_back(state_[i][0]);
        exp_avg_sqs.push_back(state_[i][1]);
      }
      if (parameters.empty()) continue;
      const std::vector<at::Tensor> steps(parameters.size(), step);
      at::_fused_adamw_(parameters, grads, exp_avgs, exp_avg_sqs, {}, steps, scalars.learning_rate, options_.beta1,
                        options_.beta2, decays ? options_.weight_decay : 0, options_.epsilon, /*amsgrad=*/false,
                        /*maximize=*/false, unscale);
    }
  }

  AdamWOptions options_;
};

class Sgd : public FlatOptimizer {
 public:
  explicit Sgd(SgdOptions options) : FlatOptimizer({"momentum"}), options_(options) {}

 private:
  void update(size_t i, int64_t offset, int64_t n, const StepScalars& scalars) override {
    const SgdConstants constants{
        .grad_scale = static_cast<float>(scalars.grad_scale),
        .weight_decay = parameters_[i].decay ? static_cast<float>(options_.weight_decay) : 0.0f,
        .momentum = static_cast<float>(options_.momentum),
        .learning_rate = static_cast<float>(scalars.learning_rate),
        .nesterov = options_.nesterov};
    sgd(parameters_[i].parameter.mutable_data_ptr<float>() + offset,
        parameters_[i].grad.const_data_ptr<float>() + offset, state_[i][0].mutable_data_ptr<float>() + offset, n,
        constants);
  }

  void update_on_device(const StepScalars& scalars) override {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      const at::Tensor &parameter = parameters_[i].parameter, &momentum = state_[i][0];
      at::Tensor grad = parameters_[i].grad.mul(scalars.grad_scale);
      if (parameters_[i].decay) grad.add_(parameter, options_.weight_decay);
      momentum.mul_(options_.momentum).add_(grad);
      parameter.sub_(options_.nesterov ? grad.add_(momentum, options_.momentum) : momentum, scalars.learning_rate);
    }
  }

  SgdOptions options_;
};

}  // namespace

std::unique_ptr<Optimizer> make_adamw(AdamWOptions options) { return std::make_unique<AdamW>(options); }
std::unique_ptr<Optimizer> make_sgd(SgdOptions options) { return std::make_unique<Sgd>(options); }

double clip_coefficient(double norm, double max_norm) {
  return max_norm <= 0 ? 1.0 : std::min(1.0, max_norm / (norm + 1e-6));
}

}  // namespace lockstep::optim
