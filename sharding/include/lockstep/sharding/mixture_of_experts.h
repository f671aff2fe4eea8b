#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/nn/linear.h>
#include <lockstep/sharding/model_parallel.h>
#include <lockstep/sharding/parameter_placement.h>

namespace lockstep {

struct MixtureOptions {
  int64_t width = 0, ffn_width = 0;
  int64_t num_experts = 8;
  int64_t top_k = 2;             ///< experts that a token goes to
  double balance_weight = 0.01;  ///< of the load-balancing loss beside a token's own; 0: none. Source: Switch
};

/// A matrix for each expert, below each other in one parameter: rows [i * out, (i + 1) * out) are expert i's. So files
/// and optimizer shards are boxes like any other's, however many experts there are. A rank of an expert group has the
/// rows of its own experts.
class ExpertLinear : public torch::nn::Module, public Placed {
 public:
  ExpertLinear(int64_t num_experts, int64_t in, int64_t out, const ModelParallel& parallel);

  /// The weight as the tokens of each rank of the expert group use it: autograd leaves over one storage, since a
  /// micro-batch's gradient must not meet another's before the sum over micro-batches does it in order. On one rank
  /// the parameter itself. Ask when the parameter's storage is what it stays.
  const std::vector<at::Tensor>& uses();
  /// A use cut by expert: [out, in] each, views.
  std::vector<at::Tensor> by_expert(int source);
  ParameterPlacement placement(const std::string& own_name) const override;

  at::Tensor weight;  ///< [this rank's experts * out, in] f32, left for initialisation by the task

 private:
  ModelParallel parallel_;
  std::vector<Part> experts_;  // by rank of the expert group
  int64_t in_, out_;
  std::vector<at::Tensor> uses_;
};

/// uses() of every ExpertLinear of a model, by name of the parameter.
std::map<std::string, std::vector<at::Tensor>> expert_uses(torch::nn::Module& model);

/// A feed-forward layer of several experts, each SwiGLU, of which a router picks top_k for each token:
///
///     p = softmax(x router^T) in f32, y = sum over the top_k experts i of x: w_i down_i(silu(gate_i x) * up_i x)
///
/// with w the picked p divided by their sum; with top_k = 1 it is p itself, or the router would learn nothing. Equal p:
/// the lower expert. No token is dropped, whatever the load. An expert's tokens come in their order, and sums over the
/// experts of a token in the order of its choices, so that bits depend on x and the weights alone; an expert without
/// tokens has a gradient of zeros.
///
/// Balance: each micro-batch's loss gets balance_weight * tokens * E * sum over experts of f_i P_i, f_i the share of
/// choices that went to expert i, P_i its mean p (1 when even). Its gradient is added where the router stands, times
/// nn::StepKey::loss_weight; the loss that a model returns stays its own. A micro-batch that is cut along the sequence
/// has one f: choices are counted over the context group and, with sequence_parallel, the tensor group.
///
/// Expert parallel: rank j of the group has every group's j-th part of the experts; tokens travel to their experts and
/// back. Each runs them for one rank's tokens after the other, the same products as on that rank alone, so that no
/// group size changes a bit.
///
/// Experts are not cut over a tensor group: with sequence_parallel its ranks have their own tokens, else they all do
/// the same. Parameters "router.weight" [E, width], "gate.weight", "up.weight", "down.weight" (ExpertLinear).
/// Collective: in forward where f is counted over ranks; in backward too over an expert group.
/// Cost: tokens * top_k * width elements sent to the experts and as many back, and again in backward, less what stays.
/// Source: Shazeer et al., arXiv:1701.06538; Fedus et al. (Switch), arXiv:2101.03961; drop-free by sorting: Gale et
/// al., arXiv:2211.15841.
class MixtureOfExperts : public torch::nn::Module {
 public:
  /// @throws ConfigError sizes that make no sense, fewer experts than ranks.
  MixtureOfExperts(const MixtureOptions& options, const ModelParallel& parallel);
  /// [B, T, width] -> the same in f32.
  at::Tensor forward(const at::Tensor& x_BTC);

 private:
  struct Routing;

  Routing route(const at::Tensor& x_NC) const;
  at::Tensor balanced(const at::Tensor& p_NE, const at::Tensor& counts_E) const;
  at::Tensor travel(const at::Tensor& rows, const std::vector<int64_t>& counts) const;
  at::Tensor run_experts(const at::Tensor& rows, const std::vector<int64_t>& counts) const;

  MixtureOptions options_;
  ModelParallel parallel_;
  std::shared_ptr<nn::Linear> router_;
  std::shared_ptr<ExpertLinear> gate_, up_, down_;
};

}  // namespace lockstep
