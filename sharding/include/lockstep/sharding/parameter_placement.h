#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/collectives/mesh.h>
#include <lockstep/sharding/shard_layout.h>

namespace lockstep {

struct TensorParallel;

/// Elements [begin, begin + size) of a dim.
struct Part {
  int64_t begin = 0;
  int64_t size = 0;
  friend bool operator==(const Part&, const Part&) = default;
};

/// A dim of `total` elements cut for `count` ranks, in order, sizes differing by at most one, the larger ones first.
/// @throws ConfigError a rank would get nothing.
std::vector<Part> even_parts(int64_t total, int count);
/// Parts of a dim whose elements are `factor` times as many: from heads to the rows of their weight.
std::vector<Part> scaled(std::vector<Part> parts, int64_t factor);

/// Where one parameter lives on the mesh's tensor axis, or that of experts.
struct ParameterPlacement {
  std::string name;            ///< as named_parameters() has it
  std::vector<int64_t> shape;  ///< global
  int tensor_dim = -1;         ///< the dim that is cut; -1: replicated
  std::vector<Part> parts;  ///< of tensor_dim, by rank of the tensor group; equal ones are replicas. Empty: replicated
  int rank = 0;             ///< this rank in the tensor group
  /// Not -1: `parts` are by rank of the expert group, in which this is it; the ranks of a tensor group have equal ones.
  int expert_rank = -1;
  /// The gradient that backward makes on this rank is one term of a sum over the ranks that hold the same part.
  bool is_partial = false;

  Part part() const { return part(rank); }
  bool is_of_experts() const { return expert_rank >= 0; }
  Part part(int tensor_rank) const;  ///< of a replicated parameter: {0, 0}
  Box box(int tensor_rank) const;
  Box box() const { return box(rank); }
  /// Whether this rank is the first that holds its part: what is counted or written once is so by it.
  bool is_first_holder() const;
};

/// A module that says where its own parameters live. The parameters of one that does not are whole on every rank.
class Placed {
 public:
  virtual ~Placed() = default;
  Placed() = default;
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;
  /// @param own_name of a parameter registered by this very module, e.g. "weight". `rank` and `name` may be left out.
  virtual ParameterPlacement placement(const std::string& own_name) const = 0;
};

/// Every parameter of the model, in the order of named_parameters(): the one declaration that initialisation, gradient
/// sums, the norm and checkpoints read.
///
/// A parameter of a module that is not Placed (a norm, positions) is replicated, and with sequence parallelism its
/// gradient is partial: each rank ran it on its own part of the sequence. One that is used between a column- and a
/// row-parallel layer, on this rank's heads or features, needs a Placed module that says so.
/// @throws CheckFailed a local tensor that has not the size its module declares.
std::vector<ParameterPlacement> placements(const torch::nn::Module& model, const TensorParallel& tp);

/// The placement on every rank of the world: equal over the pipeline, data and context axes, but for experts. With a
/// `pipeline_stage` only that stage's ranks hold anything.
ShardLayout shard_layout(const ParameterPlacement& placement, std::string dtype, const MeshShape& mesh,
                         int pipeline_stage = -1);

/// Fills this rank's part with what `fill` writes to the whole tensor, so that no layout changes initial weights.
/// `parameter`: the part, or the rows of it from `first_row` on. Cost: nn::fill_box().
void fill_part(const at::Tensor& parameter, const ParameterPlacement& placement,
               const std::function<void(const at::Tensor& whole)>& fill, int64_t first_row = 0);

/// Completes partial gradients, in place: each becomes the sum over the ranks that hold the same part, in rank order,
/// with the same bits on all of them. The others are left alone.
///
/// Collective over the tensor group; one exchange for all parameters. Cost: (t-1) x bytes of partial gradients sent.
/// @param gradients by placement, f32, each of its parameter's local shape; those that are not partial may be
/// undefined.
void reduce_partial_gradients(const std::vector<ParameterPlacement>& placements,
                              const std::vector<at::Tensor>& gradients, const TensorParallel& tp);

}  // namespace lockstep
