#include <numeric>

#include <torch/autograd.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/dropout.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/parameter.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/mixture_of_experts.h>

#include "rank_sum.h"

namespace lockstep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// rows[i] = x[of[i]] in `type`. Backward gathers too, in f32: row m of x gets the sum over taken_by[m], in that order.
struct TakeRows : Function<TakeRows> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& of, const at::Tensor& taken_by,
                            at::ScalarType type) {
    ctx->save_for_backward({taken_by});
    ctx->saved_data["type"] = static_cast<int64_t>(x.scalar_type());
    return x.to(type).index_select(0, of);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor taken_by = ctx->get_saved_variables()[0];
    const auto type = static_cast<at::ScalarType>(ctx->saved_data["type"].toInt());
    const at::Tensor rows = grads[0].index_select(0, taken_by.flatten()).to(at::kFloat).unflatten(0, taken_by.sizes());
    at::Tensor sum = rows.select(1, 0);
    for (int64_t i = 1; i < taken_by.size(1); ++i) sum = sum + rows.select(1, i);
    return {sum.to(type), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// x itself, whose gradient gets `slope` for each row on top.
struct AddSlope : Function<AddSlope> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& slope) {
    ctx->save_for_backward({slope});
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return {grads[0] + ctx->get_saved_variables()[0], at::Tensor()};
  }
};

// Every matrix at an address that memory of its own would have: sums of matrix products depend on it, and which part of
// a larger tensor an expert's rows are depends on how many ranks share the experts.
at::Tensor aligned(const at::Tensor& x) {
  constexpr uintptr_t kAlignment = 64;
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0 ? x : x.clone();
}

struct Align : Function<Align> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& x) { return aligned(x.view_as(x)); }
  static variable_list backward(AutogradContext*, const variable_list& grads) { return {aligned(grads[0])}; }
};

std::string num(int64_t value) { return std::to_string(value); }

void add_over(ProcessGroup* group, const at::Tensor& counts, Milliseconds timeout) {
  if (group && group->size() > 1) group->all_reduce(counts, ReduceOp::kSum, timeout).wait();  // integers: exact
}

}  // namespace

ExpertLinear::ExpertLinear(int64_t num_experts, int64_t in, int64_t out, const ModelParallel& parallel)
    : parallel_(parallel), experts_(even_parts(num_experts, parallel.expert.size())), in_(in), out_(out) {
  weight = register_parameter("weight", nn::new_parameter({experts_[parallel.expert.rank()].size * out, in}));
}

const std::vector<at::Tensor>& ExpertLinear::uses() {
  if (uses_.empty() && parallel_.expert.size() == 1) uses_ = {weight};
  while (static_cast<int>(uses_.size()) < parallel_.expert.size())
    uses_.push_back(weight.detach().requires_grad_(weight.requires_grad()));
  return uses_;
}

std::vector<at::Tensor> ExpertLinear::by_expert(int source) { return uses()[source].view({-1, out_, in_}).unbind(0); }

ParameterPlacement ExpertLinear::placement(const std::string&) const {
  ParameterPlacement placement;
  placement.shape = {(experts_.back().begin + experts_.back().size) * out_, in_};
  placement.is_partial = parallel_.tensor.is_sequence_parallel();
  if (parallel_.expert.size() == 1) return placement;
  placement.tensor_dim = 0;
  placement.parts = scaled(experts_, out_);
  placement.expert_rank = parallel_.expert.rank();
  return placement;
}

std::map<std::string, std::vector<at::Tensor>> expert_uses(torch::nn::Module& model) {
  std::map<std::string, std::vector<at::Tensor>> uses;
  for (const auto& item : model.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
    if (auto* const experts = dynamic_cast<ExpertLinear*>(item.value().get()))
      uses[item.key() + ".weight"] = experts->uses();
  }
  return uses;
}

// Choice: token * top_k + k. Sorted: choices by expert, each expert's in the order of tokens.
struct MixtureOfExperts::Routing {
  at::Tensor weights_NK;        // of the choices, f32
  at::Tensor sorted;            // the choice at each sorted place
  at::Tensor place_NK;          // the sorted place of each choice
  at::Tensor tokens;            // the token at each sorted place
  std::vector<int64_t> counts;  // of choices, by expert
};

MixtureOfExperts::MixtureOfExperts(const MixtureOptions& options, const ModelParallel& parallel)
    : options_(options), parallel_(parallel) {
  if (options.num_experts < 1 || options.top_k < 1 || options.top_k > options.num_experts) {
    throw ConfigError("a token can not go to " + num(options.top_k) + " of " + num(options.num_experts) +
                      " experts. Mend: --experts_per_token from 1 to --experts");
  }
  if (options.num_experts < parallel.expert.size()) {
    throw ConfigError("--experts=" + num(options.num_experts) + " are too few for --expert_parallel_size=" +
                      num(parallel.expert.size()) + ": each of its ranks has at least one");
  }
  router_ = register_module("router", std::make_shared<nn::Linear>(options.width, options.num_experts, /*bias=*/false));
  const auto experts = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, std::make_shared<ExpertLinear>(options.num_experts, in, out, parallel));
  };
  gate_ = experts("gate", options.width, options.ffn_width);
  up_ = experts("up", options.width, options.ffn_width);
  down_ = experts("down", options.ffn_width, options.width);
}

at::Tensor MixtureOfExperts::forward(const at::Tensor& x_BTC) {
  const at::Tensor x_NC = x_BTC.reshape({-1, x_BTC.size(-1)});
  const Routing routing = route(x_NC);
  const auto type = nn::is_bf16() ? at::kBFloat16 : x_NC.scalar_type();
  const at::Tensor rows = TakeRows::apply(x_NC, routing.tokens, routing.place_NK, type);
  const at::Tensor outputs = travel(rows, routing.counts);
  const at::Tensor y_NKC =
      TakeRows::apply(outputs, routing.place_NK.flatten(), routing.sorted.unsqueeze(1), outputs.scalar_type())
          .unflatten(0, routing.place_NK.sizes());
  at::Tensor y_NC = y_NKC.select(1, 0).to(at::kFloat) * routing.weights_NK.select(1, 0).unsqueeze(1);
  for (int64_t k = 1; k < options_.top_k; ++k)
    y_NC = y_NC + y_NKC.select(1, k).to(at::kFloat) * routing.weights_NK.select(1, k).unsqueeze(1);
  return y_NC.view(x_BTC.sizes());
}

MixtureOfExperts::Routing MixtureOfExperts::route(const at::Tensor& x_NC) const {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor p_NE = at::linear(x_NC.to(at::kFloat), router_->weight).softmax(-1);
  const at::Tensor experts_NK =
      std::get<1>(p_NE.detach().sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true)).narrow(1, 0, options_.top_k);
  const at::Tensor experts = experts_NK.flatten();
  const at::Tensor counts_E = at::bincount(experts, {}, options_.num_experts);
  p_NE = balanced(p_NE, counts_E);

  Routing routing;
  const at::Tensor picked = p_NE.gather(1, experts_NK);
  routing.weights_NK = options_.top_k == 1 ? picked : picked / picked.sum(1, /*keepdim=*/true);
  routing.sorted = experts.argsort(/*stable=*/true, /*dim=*/0);
  const at::Tensor places = at::arange(experts.numel(), experts.options());
  routing.place_NK = at::empty_like(experts).scatter_(0, routing.sorted, places).view(experts_NK.sizes());
  routing.tokens = routing.sorted.div(options_.top_k, "floor");
  const at::Tensor counts = counts_E.cpu();
  routing.counts.assign(counts.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>() + counts.numel());
  return routing;
}

// f is a constant to the gradient, so that of the balance loss by p is the same for every token: weight * E * f.
at::Tensor MixtureOfExperts::balanced(const at::Tensor& p_NE, const at::Tensor& counts_E) const {
  if (options_.balance_weight == 0 || !is_training() || !p_NE.requires_grad()) return p_NE;
  const at::Tensor counts = counts_E.clone();
  add_over(parallel_.context.group, counts, parallel_.context.timeout);
  if (parallel_.tensor.sequence_parallel) add_over(parallel_.tensor.group, counts, parallel_.tensor.timeout);
  const at::Tensor share = counts.to(at::kFloat) / counts.sum().to(at::kFloat);
  const double scale = options_.balance_weight * static_cast<double>(options_.num_experts) * nn::step_key().loss_weight;
  return AddSlope::apply(p_NE, share * scale);
}

// Rows to the ranks of their experts, through them, and back to where they came from.
at::Tensor MixtureOfExperts::travel(const at::Tensor& rows, const std::vector<int64_t>& counts) const {
  const ExpertParallel& ep = parallel_.expert;
  if (ep.size() == 1) return run_experts(rows, counts);
  const at::Tensor all = gather_ranks(*ep.group, at::tensor(counts), ep.timeout);
  const auto rows_of = all.accessor<int64_t, 2>();  // [source rank][expert]
  const std::vector<Part> experts = even_parts(options_.num_experts, ep.size());
  std::vector<int64_t> send, receive, received_counts;
  for (int rank = 0; rank < ep.size(); ++rank) {
    const auto& [begin, size] = experts[rank];
    send.push_back(std::accumulate(counts.begin() + begin, counts.begin() + begin + size, int64_t{0}));
    receive.push_back(0);
    const auto& mine = experts[ep.rank()];
    for (int64_t i = mine.begin; i < mine.begin + mine.size; ++i) {
      received_counts.push_back(rows_of[rank][i]);
      receive.back() += received_counts.back();
    }
  }
  return exchange_rows(run_experts(exchange_rows(rows, send, receive, ep), received_counts), receive, send, ep);
}

// `counts` of rows by source rank, then by this rank's experts. Those without rows run too: so the graph is the same on
// all ranks, and their gradients are zeros.
at::Tensor MixtureOfExperts::run_experts(const at::Tensor& rows, const std::vector<int64_t>& counts) const {
  const auto inputs = rows.split_with_sizes(counts);
  const at::Tensor none;
  // In bf16 they are cast to memory of their own, once: by their place they are known.
  const auto matrix = [](const at::Tensor& weight) { return nn::is_bf16() ? weight : Align::apply(weight); };
  std::vector<at::Tensor> outputs;
  for (int source = 0; source < parallel_.expert.size(); ++source) {
    const auto gate = gate_->by_expert(source), up = up_->by_expert(source), down = down_->by_expert(source);
    for (size_t i = 0; i < gate.size(); ++i) {
      const at::Tensor x = Align::apply(inputs[outputs.size()]);
      const at::Tensor hidden = nn::swiglu(nn::linear(x, matrix(gate[i]), none), nn::linear(x, matrix(up[i]), none));
      outputs.push_back(Align::apply(nn::linear(hidden, matrix(down[i]), none)));
    }
  }
  return at::cat(outputs);
}

}  // namespace lockstep
