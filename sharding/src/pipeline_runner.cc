#include <map>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/pipeline_runner.h>

#include "boundary.h"

namespace lockstep {
namespace {

using Kind = ActionKind;
using Moment = PipelineCallbacks::Moment;

// Where a stage's graph ends: keeps the gradient as the engine brings it. A leaf's .grad would be laid out anew, and a
// leaf could not be changed in place, as the uncut model may do.
struct GraphEnd : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    gradient = std::move(gradients[0]);
    return {};
  }
  std::string name() const override { return "PipelineBoundary"; }
  at::Tensor gradient;
};

// One chunk of one micro-batch between its forward and the end of its backward.
struct Piece {
  at::Tensor output;  // until it is sent
  bool output_requires_grad = false;
  torch::autograd::Edge root;       // the output's place in the graph, which needs no output
  std::shared_ptr<GraphEnd> input;  // null: the input requires no gradient
};

}  // namespace

struct PipelineRunner::Exchange : BoundaryExchange {
  using BoundaryExchange::BoundaryExchange;
};

class PipelineRunner::Step {
 public:
  Step(ProcessGroup& pipeline, BoundaryExchange& exchange, const PipelineSchedule& schedule,
       const PipelineCallbacks& callbacks)
      : schedule_(schedule),
        callbacks_(callbacks),
        exchange_(exchange),
        stage_(pipeline.rank()),
        next_((stage_ + 1) % pipeline.size()),
        previous_((stage_ + pipeline.size() - 1) % pipeline.size()) {}

  std::vector<at::Tensor> run() {
    const c10::AutoGradMode graphs(schedule_.has_backward);
    if (stage_ == schedule_.num_stages - 1) results_.resize(schedule_.num_micro_batches);
    for (const PipelineAction& action : schedule_.stages[stage_]) {
      action.is_transfer() ? transfer(action) : action.kind == Kind::kForward ? forward(action) : backward(action);
      exchange_.poll();
    }
    exchange_.finish();
    return std::move(results_);
  }

 private:
  int position(const PipelineAction& action) const { return action.chunk * schedule_.num_stages + stage_; }
  bool is_last(const PipelineAction& action) const { return position(action) == schedule_.num_positions() - 1; }
  bool is_local() const { return schedule_.num_stages == 1; }
  Piece& piece(const PipelineAction& action) { return pieces_[{action.micro_batch, action.chunk}]; }
  // The boundaries before and after a position: named by the position before them.
  BoundaryKey activation(const PipelineAction& action, bool before) const {
    return {false, action.micro_batch, position(action) - (before ? 1 : 0)};
  }
  BoundaryKey gradient(const PipelineAction& action, bool before) const {
    return {true, action.micro_batch, position(action) - (before ? 1 : 0)};
  }

  template <typename Body>
  void observed(const PipelineAction& action, Body body) {
    if (callbacks_.observe) callbacks_.observe(action, Moment::kBegin);
    body();
    if (callbacks_.observe) callbacks_.observe(action, Moment::kEnd);
  }

  void transfer(const PipelineAction& action) {
    observed(action, [&] {
      switch (action.kind) {
        case Kind::kSendForward:
          return send_output(action);
        case Kind::kSendBackward:
          return send_gradient(action);
        case Kind::kRecvForward:
          return exchange_.expect(previous_, activation(action, /*before=*/true));
        default:
          if (piece(action).output_requires_grad) exchange_.expect(next_, gradient(action, /*before=*/false));
      }
    });
  }

  void send_output(const PipelineAction& action) {
    Piece& done = piece(action);
    exchange_.send(next_, activation(action, /*before=*/false),
                   {std::exchange(done.output, at::Tensor()), done.output_requires_grad});
    if (!schedule_.has_backward) pieces_.erase({action.micro_batch, action.chunk});
  }

  void send_gradient(const PipelineAction& action) {
    const auto done = pieces_.extract({action.micro_batch, action.chunk});
    if (const auto& input = done.mapped().input)
      exchange_.send(previous_, gradient(action, /*before=*/true), {std::move(input->gradient)});
  }

  // The tensor from the position before: from a peer, or handed over on the one stage there is.
  BoundaryTensor take_input(const PipelineAction& action) {
    if (!is_local()) return exchange_.take(previous_, activation(action, /*before=*/true));
    Piece& before = pieces_[{action.micro_batch, action.chunk - 1}];
    BoundaryTensor tensor{std::exchange(before.output, at::Tensor()), before.output_requires_grad};
    if (!schedule_.has_backward) pieces_.erase({action.micro_batch, action.chunk - 1});
    return tensor;
  }

  at::Tensor take_gradient(const PipelineAction& action) {
    if (!piece(action).output_requires_grad) return {};
    if (!is_local()) return exchange_.take(next_, gradient(action, /*before=*/false)).value;
    const auto after = pieces_.extract({action.micro_batch, action.chunk + 1});
    return std::move(after.mapped().input->gradient);
  }

  void forward(const PipelineAction& action) {
    at::Tensor input;
    std::shared_ptr<GraphEnd> end;
    if (position(action) > 0) {
      BoundaryTensor taken = take_input(action);
      input = std::move(taken.value);
      if (taken.requires_grad) {
        end = std::make_shared<GraphEnd>();
        torch::autograd::create_gradient_edge(input, end);
      }
    }
    observed(action, [&] {
      const at::Tensor output = callbacks_.forward(action.micro_batch, action.chunk, std::move(input));
      LOCKSTEP_CHECK(output.defined()) << "stage " << stage_ << ": " << action.describe() << " returned no tensor";
      keep(action, output, std::move(end));
    });
  }

  void keep(const PipelineAction& action, const at::Tensor& output, std::shared_ptr<GraphEnd> end) {
    if (is_last(action)) {
      LOCKSTEP_CHECK(output.requires_grad() || !schedule_.has_backward)
          << "the loss of micro-batch " << action.micro_batch
          << " requires no gradient: nothing before it is trainable";
      results_[action.micro_batch] = output.detach();
      if (!schedule_.has_backward) return;
    }
    Piece& done = piece(action);
    if (!is_last(action)) done.output = output.detach();
    done.output_requires_grad = schedule_.has_backward && output.requires_grad();
    if (done.output_requires_grad) done.root = torch::autograd::impl::gradient_edge(output);
    done.input = std::move(end);
  }

  at::Tensor first_gradient(const PipelineAction& action) const {
    const at::Tensor& loss = results_[action.micro_batch];
    return callbacks_.loss_gradient ? callbacks_.loss_gradient(action.micro_batch, loss) : at::ones_like(loss);
  }

  void backward(const PipelineAction& action) {
    at::Tensor gradient = is_last(action) ? first_gradient(action) : take_gradient(action);
    observed(action, [&] {
      if (callbacks_.before_backward) callbacks_.before_backward(action.micro_batch, action.chunk);
      if (torch::autograd::Edge root = std::exchange(piece(action).root, {}); gradient.defined()) {
        torch::autograd::variable_list gradients{std::move(gradient)};
        torch::autograd::Engine::get_default_engine().execute({std::move(root)}, gradients, /*keep_graph=*/false,
                                                              /*create_graph=*/false, /*accumulate_grad=*/true);
      }
      if (callbacks_.after_backward) callbacks_.after_backward(action.micro_batch, action.chunk);
    });
    if (position(action) == 0) pieces_.erase({action.micro_batch, action.chunk});
  }

  const PipelineSchedule& schedule_;
  const PipelineCallbacks& callbacks_;
  BoundaryExchange& exchange_;
  int stage_, next_, previous_;
  std::map<std::pair<int64_t, int>, Piece> pieces_;  // by micro-batch and chunk
  std::vector<at::Tensor> results_;
};

PipelineRunner::PipelineRunner(ProcessGroup& pipeline, PipelineRunnerOptions options)
    : pipeline_(pipeline), exchange_(std::make_unique<Exchange>(pipeline, options.device, options.timeout)) {}

PipelineRunner::~PipelineRunner() = default;

std::vector<at::Tensor> PipelineRunner::run(const PipelineSchedule& schedule, const PipelineCallbacks& callbacks) {
  LOCKSTEP_CHECK(schedule.num_stages == pipeline_.size())
      << "a schedule of " << schedule.num_stages << " stages cannot run on the " << pipeline_.size()
      << " ranks of group " << pipeline_.name();
  LOCKSTEP_CHECK(exchange_->is_idle()) << "group " << pipeline_.name() << ": the step before this one failed";
  return Step(pipeline_, *exchange_, schedule, callbacks).run();
}

}  // namespace lockstep
