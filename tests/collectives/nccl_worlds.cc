// Ranks as processes under mpirun, over NCCL on real GPUs: host tensors, and the same calls on device memory. Ranks
// that share a GPU pose as hosts of their own, for two ranks of one host on one GPU are a mistake to NCCL.
#include "nccl_worlds.h"

#include <cstdlib>
#include <thread>
#include <utility>

#include <gtest/gtest.h>
#include <mpi.h>

#include <lockstep/collectives/arithmetic.h>

#include "../sharding/forwarding_group.h"
#include "run_or_abort.h"

namespace lockstep {
namespace {

// Every call on copies in device memory; what it writes comes back with wait() or poll().
class ThroughDevice : public test::ForwardingGroup {
 public:
  explicit ThroughDevice(ProcessGroup& inner) : ForwardingGroup(inner) {}

  Work all_reduce(at::Tensor tensor, ReduceOp op, Milliseconds timeout) override {
    const at::Tensor there = on_device(tensor);
    return brings_back(ForwardingGroup::all_reduce(there, op, timeout), tensor, there);
  }
  Work reduce_scatter(at::Tensor output, at::Tensor input, ReduceOp op, Milliseconds timeout) override {
    const at::Tensor there = on_device(output);
    return brings_back(ForwardingGroup::reduce_scatter(there, on_device(input), op, timeout), output, there);
  }
  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    const at::Tensor there = on_device(output);
    return brings_back(ForwardingGroup::all_gather(there, on_device(input), timeout), output, there);
  }
  Work all_gather_uneven(at::Tensor output, at::Tensor input, std::span<const int64_t> counts,
                         Milliseconds timeout) override {
    const at::Tensor there = on_device(output);
    return brings_back(ForwardingGroup::all_gather_uneven(there, on_device(input), counts, timeout), output, there);
  }
  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    const at::Tensor there = on_device(output);
    return brings_back(ForwardingGroup::all_to_all(there, on_device(input), receive_counts, send_counts, timeout),
                       output, there);
  }
  Work broadcast(at::Tensor tensor, int root, Milliseconds timeout) override {
    const at::Tensor there = on_device(tensor);
    return brings_back(ForwardingGroup::broadcast(there, root, timeout), tensor, there);
  }
  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    return ForwardingGroup::send(on_device(tensor), to, tag, timeout);
  }
  Work recv(at::Tensor tensor, int from, int tag, Milliseconds timeout) override {
    const at::Tensor there = on_device(tensor);
    return brings_back(ForwardingGroup::recv(there, from, tag, timeout), tensor, there);
  }
  std::unique_ptr<ProcessGroup> make_part(int color, int key, const std::string& name) override {
    return std::unique_ptr<ProcessGroup>(new ThroughDevice(ForwardingGroup::make_part(color, key, name)));
  }

 private:
  explicit ThroughDevice(std::unique_ptr<ProcessGroup> inner) : ForwardingGroup(*inner), owned_(std::move(inner)) {}

  class Operation : public Work::Operation {
   public:
    Operation(Work inner, at::Tensor host, at::Tensor device)
        : inner_(std::move(inner)), host_(std::move(host)), device_(std::move(device)) {}
    void wait() override {  // not inner_'s, which leaves the host to find out later how it ended
      while (!poll()) std::this_thread::yield();
    }
    bool poll() override {
      if (!inner_.poll()) return false;
      host_.copy_(device_);
      return true;
    }

   private:
    Work inner_;
    at::Tensor host_, device_;
  };

  static at::Tensor on_device(const at::Tensor& tensor) { return tensor.to(nccl_device()); }
  static Work brings_back(Work work, at::Tensor host, at::Tensor device) {
    return Work(std::make_unique<Operation>(std::move(work), std::move(host), std::move(device)));
  }

  std::unique_ptr<ProcessGroup> owned_;
};

int rank_in_mpi() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

}  // namespace

const CudaState& cuda_state() {
  static const CudaState state = load_cuda_plugin();
  return state;
}

at::Device nccl_device() {
  return {at::kCUDA, static_cast<c10::DeviceIndex>(rank_in_mpi() % cuda_state().plugin->device_count())};
}

std::vector<World> worlds() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return {{.name = "nccl", .size = size, .is_one_queue = true},
          {.name = "nccl_through_device", .size = size, .is_one_queue = true}};
}

void run_ranks(const World& world, const std::function<void(ProcessGroup&)>& body) {
  if (!cuda_state().has_driver) GTEST_SKIP() << "no GPU: " << cuda_state().why;
  ASSERT_NE(cuda_state().plugin, nullptr) << cuda_state().why;
  run_or_abort(world, [&] {
    configure_arithmetic(1);
    const CudaPlugin& plugin = *cuda_state().plugin;
    if (world.size > plugin.device_count()) {
      setenv("NCCL_HOSTID", ("lockstep-test-" + std::to_string(rank_in_mpi())).c_str(), 1);
      setenv("NCCL_SOCKET_IFNAME", "lo", 0);
      setenv("NCCL_IB_DISABLE", "1", 0);
    }
    const auto share = [](std::span<std::byte> id) {
      MPI_Bcast(id.data(), static_cast<int>(id.size()), MPI_BYTE, 0, MPI_COMM_WORLD);
    };
    plugin.set_device(nccl_device().index());
    const auto group = plugin.make_nccl_world({.rank = rank_in_mpi(),
                                               .world_size = world.size,
                                               .device = nccl_device().index(),
                                               .timeout = std::chrono::seconds(60),
                                               .share_id = share});
    if (world.name == "nccl_through_device") {
      ThroughDevice through(*group);
      body(through);
    } else {
      body(*group);
    }
    group->close();
  });
}

}  // namespace lockstep
