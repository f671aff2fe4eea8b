#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/collectives/mesh.h>
#include <lockstep/sharding/gradient_sync.h>
#include <lockstep/sharding/layer_stack.h>
#include <lockstep/sharding/parameter_placement.h>
#include <lockstep/sharding/shard_layout.h>
#include <lockstep/sharding/tensor_parallel.h>
#include <lockstep/sharding/unit.h>

namespace lockstep::train {

/// The shape under which a parameter is saved: a scalar is one row, which a rank can hold or not.
std::vector<int64_t> stored_shape(at::IntArrayRef shape);

/// A parameter that this rank's model has.
struct ModelParameter {
  std::string name;      ///< in this rank's model
  std::string own_name;  ///< under which values are made and saved: of a tied weight, its first use's
  at::Tensor tensor;     ///< lane 0's
  bool is_trainable = true;
  int64_t first_use = -1;     ///< index of the parameter whose storage this one shares
  bool is_tied_away = false;  ///< the other use is on another stage
  size_t unit = 0, place_in_unit = 0;
  ParameterPlacement placement;  ///< on the tensor axis, or among the ranks that share experts
};

/// A tensor of the whole model, wherever it is: equal on all ranks.
struct GlobalTensor {
  std::string name;
  std::vector<int64_t> shape;
  int tensor_dim = -1;      ///< cut over the tensor axis, or over the ranks that share experts: -1 not
  std::vector<Part> parts;  ///< of tensor_dim, by rank there
  bool is_of_experts = false;
  std::string dtype;
  bool is_buffer = false;
  bool is_trainable = false;
  std::vector<int> stages;  ///< of the pipeline, that hold it
  int64_t local = -1;       ///< index of this rank's ModelParameter, or of its buffer
};

/// Which parameters there are, here and elsewhere. Collective to build, over the pipeline axis.
class ParameterTable {
 public:
  ParameterTable() = default;
  ParameterTable(torch::nn::Module& model, const Mesh& mesh, const TensorParallel& tensor);

  const std::vector<ModelParameter>& locals() const { return locals_; }
  /// Those that own parameters.
  const std::vector<FoundUnit>& units() const { return units_; }
  const std::vector<GlobalTensor>& globals() const { return globals_; }
  const std::vector<at::Tensor>& buffers() const { return buffers_; }
  /// Indices into locals() of what is trained.
  const std::vector<size_t>& trainable() const { return trainable_; }
  /// The pipeline stages that hold a parameter, ascending.
  const std::vector<int>& stages_of(const std::string& own_name) const;
  /// locals() of each unit, with the trainable ones' numbers among trainable().
  std::vector<std::vector<size_t>> trainable_by_unit() const;

 private:
  void find_locals(torch::nn::Module& model, const TensorParallel& tensor);
  void find_ties(const LayerStack* stack);
  void find_globals(torch::nn::Module& model, const Mesh& mesh);

  std::vector<ModelParameter> locals_;
  std::vector<at::Tensor> buffers_;
  std::vector<FoundUnit> units_;
  std::vector<size_t> trainable_;
  std::vector<GlobalTensor> globals_;
};

}  // namespace lockstep::train
