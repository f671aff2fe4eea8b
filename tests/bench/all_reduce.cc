// all_reduce_bench WHAT BYTES: one all-reduce of f32 under mpirun, timed. WHAT: mapped (ours, of tensors the peers
// reach), watched (the same, noted in a flight ring), plain (ours, of ordinary tensors), mpi (MPI_Allreduce as mpirun's
// parameters have it). Rank 0 prints the median over rounds of the slowest rank's microseconds; a wrong sum ends it
// with 1.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <ATen/ops/empty.h>
#include <mpi.h>

#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/shm_group.h>

#include "watched_group.h"

namespace {

using namespace lockstep;
using Clock = std::chrono::steady_clock;

float term(int rank, int64_t i) { return static_cast<float>(i % 1021 + rank); }

void fill(const at::Tensor& x, int rank) {
  auto* data = x.mutable_data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i) data[i] = term(rank, i);
}

bool is_sum(const at::Tensor& x, int ranks) {
  const auto* data = x.const_data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    float sum = 0;
    for (int rank = 0; rank < ranks; ++rank) sum += term(rank, i);
    if (data[i] != sum) return false;
  }
  return true;
}

// Small ones many at a time, since a look at the clock and a barrier cost as much as they do.
// Large ones are written before each: what is summed in training has just been made by its rank.
double median_us(int64_t bytes, const std::function<void()>& all_reduce, const std::function<void()>& write) {
  const int batch = bytes <= 16384 ? 200 : 1;
  const int rounds = static_cast<int>(std::clamp<int64_t>((int64_t{4} << 30) / std::max<int64_t>(bytes, 1), 11, 201));
  std::vector<double> took(rounds), slowest(rounds);
  for (double& us : took) {
    if (batch == 1) write();
    MPI_Barrier(MPI_COMM_WORLD);
    const auto start = Clock::now();
    for (int i = 0; i < batch; ++i) all_reduce();
    us = std::chrono::duration<double, std::micro>(Clock::now() - start).count() / batch;
  }
  MPI_Allreduce(took.data(), slowest.data(), rounds, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  std::nth_element(slowest.begin(), slowest.begin() + rounds / 2, slowest.end());
  return slowest[rounds / 2];
}

int measure(const std::string& what, int64_t bytes) {
  auto world = make_shm_group(make_mpi_world());
  if (what == "watched") {
    std::shared_ptr<flight::Ring> ring =
        flight::Ring::create(flight::ring_path(flight::job_key(process_environment()), world->rank()),
                             {.rank = world->rank(), .world_size = world->size()});
    auto group = ring->add_world();
    world = watch_world(std::move(world), std::move(ring), std::move(group));
  }
  const int64_t numel = bytes / 4;
  const at::Tensor x = what == "mapped" || what == "watched" ? world->empty_mapped(numel, at::TensorOptions(at::kFloat))
                                                             : at::empty({numel}, at::kFloat);
  const std::function<void()> ours = [&] { world->all_reduce(x).wait(); }, theirs = [&] {
    MPI_Allreduce(MPI_IN_PLACE, x.mutable_data_ptr(), static_cast<int>(numel), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  };
  const auto& all_reduce = what == "mpi" ? theirs : ours;
  int wrong = 0, any_wrong = 0;
  for (int round = 0; round < 3; ++round) {  // also the warm-up
    fill(x, world->rank());
    all_reduce();
    wrong += is_sum(x, world->size()) ? 0 : 1;
  }
  x.zero_();  // what is summed again and again stays a number
  const double us = median_us(bytes, all_reduce, [&] { x.zero_(); });
  MPI_Allreduce(&wrong, &any_wrong, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  if (world->rank() == 0) std::printf("%.3f\n", us);
  world->close();
  return any_wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  int granted = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &granted);
  configure_arithmetic(1);
  const int code = measure(argc > 1 ? argv[1] : "mapped", argc > 2 ? std::atoll(argv[2]) : 4);
  MPI_Finalize();
  return code;
}
