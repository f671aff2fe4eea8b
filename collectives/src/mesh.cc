#include <numeric>

#include <lockstep/base/error.h>
#include <lockstep/collectives/mesh.h>

namespace lockstep {

MeshShape resolve_mesh(MeshShape wanted, int world_size) {
  for (const int size : {wanted.pipeline, wanted.context, wanted.tensor, wanted.expert}) {
    if (size < 1) throw ConfigError("a parallel size is " + std::to_string(size) + "; it must be at least 1");
  }
  const int others = wanted.pipeline * wanted.context * wanted.tensor;
  const int left = world_size / others;
  if (wanted.data == 0 && left * others == world_size) wanted.data = left;
  if (wanted.data * others != world_size) {
    const std::string product = "dp " + std::to_string(wanted.data == 0 ? left : wanted.data) + " x cp " +
                                std::to_string(wanted.context) + " x tp " + std::to_string(wanted.tensor) + " x pp " +
                                std::to_string(wanted.pipeline);
    throw ConfigError(product + " = " + std::to_string((wanted.data == 0 ? left : wanted.data) * others) +
                      ", but world_size is " + std::to_string(world_size) +
                      (left * others == world_size ? "; set --data_parallel_size=" + std::to_string(left)
                                                   : "; start a multiple of " + std::to_string(others) + " ranks"));
  }
  if (wanted.data % wanted.expert != 0) {
    throw ConfigError("expert-parallel size " + std::to_string(wanted.expert) + " does not divide data-parallel size " +
                      std::to_string(wanted.data) + ", whose ranks share the experts; set --expert_parallel_size=" +
                      std::to_string(std::gcd(wanted.data, wanted.expert)));
  }
  return wanted;
}

Mesh::Mesh(ProcessGroup& world, MeshShape shape) : shape_(resolve_mesh(shape, world.size())), world_(&world) {
  // rank = ((pipeline * data_size + data) * context_size + context) * tensor_size + tensor
  const int t = shape_.tensor, c = shape_.context, d = shape_.data, rank = world.rank();
  const int tensor = rank % t, context = rank / t % c, data = rank / (t * c) % d, pipeline = rank / (t * c * d);
  tensor_ = world.split(rank / t, tensor, "tensor");
  context_ = world.split(rank / (t * c) * t + tensor, context, "context");
  data_ = world.split(pipeline * (c * t) + rank % (t * c), data, "data");
  pipeline_ = world.split(rank % (t * c * d), pipeline, "pipeline");
  if (shape_.expert == 1) return;
  experts_ = data_->split(data / shape_.expert, data, "experts");
  expert_replicas_ = data_->split(data % shape_.expert, data, "expert replicas");
}

Mesh::~Mesh() = default;

std::string Mesh::describe() const {
  return "pp " + std::to_string(shape_.pipeline) + " x dp " + std::to_string(shape_.data) + " x cp " +
         std::to_string(shape_.context) + " x tp " + std::to_string(shape_.tensor) +
         (shape_.expert > 1 ? ", experts shared by " + std::to_string(shape_.expert) : "") + " over " +
         std::to_string(world_->size()) + " rank" + (world_->size() == 1 ? "" : "s") + " (" + world_->backend() + ")";
}

void Mesh::close() {
  for (auto* group :
       {pipeline_.get(), data_.get(), context_.get(), tensor_.get(), experts_.get(), expert_replicas_.get()}) {
    if (group) group->close();
  }
}

}  // namespace lockstep
