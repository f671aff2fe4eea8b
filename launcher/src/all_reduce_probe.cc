// all_reduce_probe: what `lockstep doctor --hosts` starts a rank of on each host. Sums 16 MiB over all ranks a few
// times and says how fast; ends with 1 where a sum is wrong. MPI alone: it shows what the network does, without
// LibTorch.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include <mpi.h>

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  constexpr int kCount = 4 << 20, kRounds = 3;
  std::vector<float> sum(kCount);
  bool right = true;
  double best_s = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    std::fill(sum.begin(), sum.end(), static_cast<float>(rank + 1));
    MPI_Barrier(MPI_COMM_WORLD);
    const auto start = std::chrono::steady_clock::now();
    MPI_Allreduce(MPI_IN_PLACE, sum.data(), kCount, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
    best_s = std::min(best_s, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    const float expected = static_cast<float>(size) * static_cast<float>(size + 1) / 2;
    right &= std::all_of(sum.begin(), sum.end(), [&](float value) { return value == expected; });
  }
  if (rank == 0) std::printf("all-reduce %.1f MB/s\n", kCount * sizeof(float) / best_s / 1e6);
  if (!right) std::fprintf(stderr, "a sum is wrong on rank %d\n", rank);
  MPI_Finalize();
  return right ? 0 : 1;
}
