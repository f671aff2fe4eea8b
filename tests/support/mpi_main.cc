// main() of a GoogleTest binary that runs under mpirun: every rank runs every test, the verdict is merged before exit, and an
// exception or failure on one rank fails the whole run instead of leaving the others in a collective.
#include <mpi.h>

#include <cstdio>

#include <gtest/gtest.h>

int main(int argc, char** argv) {
  int granted = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &granted);
  testing::InitGoogleTest(&argc, argv);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) delete listeners.Release(listeners.default_result_printer());  // one report, rank 0's; failures of others below

  int failed = RUN_ALL_TESTS();
  if (failed && rank != 0) std::fprintf(stderr, "[rank %d] a test failed on this rank; run it alone to see which\n", rank);
  int any_failed = 0;
  MPI_Allreduce(&failed, &any_failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return any_failed;
}
