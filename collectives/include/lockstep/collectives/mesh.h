#pragma once

#include <memory>
#include <string>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// Sizes of the mesh axes, outermost first; 0 for data means "what is left".
struct MeshShape {
  int pipeline = 1;
  int data = 0;
  int context = 1;
  int tensor = 1;
  int expert = 1;  ///< ranks of the data axis that share a set of experts: no axis of its own, it divides data
};

/// @throws ConfigError printing both sides, e.g. "dp 3 x tp 2 x pp 1 = 6, but world_size is 8; set
/// --data_parallel_size=4".
MeshShape resolve_mesh(MeshShape wanted, int world_size);

/// The world cut along its axes, one group an axis. Ranks are laid out pipeline, data, context, tensor, the last
/// fastest, so a tensor-parallel group sits on neighbours. Expert groups are cut from the data axis, neighbours too.
/// Collective to build.
class Mesh {
 public:
  Mesh(ProcessGroup& world, MeshShape shape);
  ~Mesh();
  Mesh(const Mesh&) = delete;
  Mesh& operator=(const Mesh&) = delete;
  const MeshShape& shape() const { return shape_; }
  ProcessGroup& world() const { return *world_; }
  ProcessGroup& data() const { return *data_; }
  ProcessGroup& tensor() const { return *tensor_; }
  ProcessGroup& context() const { return *context_; }
  ProcessGroup& pipeline() const { return *pipeline_; }
  /// The ranks among which the experts are shared; and those, one of each such group, that have the same ones. Null
  /// where every rank has all.
  ProcessGroup* experts() const { return experts_.get(); }
  ProcessGroup* expert_replicas() const { return expert_replicas_.get(); }
  std::string describe() const;  ///< "pp 1 x dp 4 x cp 1 x tp 1 over 4 ranks (mpi)"
  void close();

 private:
  MeshShape shape_;
  ProcessGroup* world_;
  std::unique_ptr<ProcessGroup> pipeline_, data_, context_, tensor_, experts_, expert_replicas_;
};

}  // namespace lockstep
