// Ranks as processes that share memory: mpirun decides how many.
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <mpi.h>

#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/shm_group.h>

#include "run_or_abort.h"
#include "worlds.h"

namespace lockstep {

std::vector<World> worlds() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return {{.name = "shm", .size = size, .is_checked = true},
          {.name = "shm_in_pieces", .size = size, .call_limit_elements = 5, .is_checked = true},
          {.name = "shm_mapped", .size = size, .call_limit_elements = 5, .is_checked = true},
          {.name = "shm_half_mapped", .size = size, .call_limit_elements = 5, .is_checked = true}};
}

// While it lives, every CPU tensor of this process lies in memory the group has mapped.
class MappedTensors : public c10::Allocator {
 public:
  explicit MappedTensors(ProcessGroup& group) : group_(group), before_(c10::GetCPUAllocator()) {
    c10::SetCPUAllocator(this, 1);
  }
  MappedTensors(const MappedTensors&) = delete;
  MappedTensors& operator=(const MappedTensors&) = delete;
  ~MappedTensors() override { c10::SetCPUAllocator(before_, 1); }

  c10::DataPtr allocate(size_t bytes) override {
    auto* held = new at::Tensor(group_.empty_mapped(static_cast<int64_t>(bytes), at::kByte));
    return {held->mutable_data_ptr(), held, [](void* tensor) { delete static_cast<at::Tensor*>(tensor); },
            at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  ProcessGroup& group_;
  c10::Allocator* before_;
};

void run_ranks(const World& world, const std::function<void(ProcessGroup&)>& body) {
  run_or_abort(world, [&] {
    configure_arithmetic(1);
    ShmOptions options;
    if (world.call_limit_elements > 0) options = {.round_bytes = int64_t{64} * world.size, .letter_bytes = 0};
    const auto group = make_shm_group(make_mpi_world(), options);
    std::optional<MappedTensors> mapped;
    if (world.name == "shm_mapped" || (world.name == "shm_half_mapped" && group->rank() % 2 == 0))
      mapped.emplace(*group);
    body(*group);
    group->close();
  });
}

}  // namespace lockstep
