// main() of a GoogleTest binary that runs under mpirun: every rank runs every test, and the verdict is merged before
// exit. A rank that leaves a test early strands the others: prefer EXPECT to ASSERT between collectives.
#include <cstdio>
#include <string>

#include <gtest/gtest.h>
#include <mpi.h>

#ifdef LOCKSTEP_SANITIZED
// Open MPI's plug-ins stay loaded, so that a report of leaks can say that they are theirs (lsan.supp).
extern "C" int dlclose(void* /*library*/) { return 0; }
#endif

namespace {

// Rank 0 has GoogleTest's own report; of the others one sees what failed, and on which rank.
class FailuresOnly : public testing::EmptyTestEventListener {
 public:
  explicit FailuresOnly(int rank) : rank_(rank) {}
  void OnTestStart(const testing::TestInfo& test) override {
    name_ = std::string(test.test_suite_name()) + "." + test.name();
  }
  void OnTestPartResult(const testing::TestPartResult& result) override {  // holds UnitTest's lock: nothing to ask it
    if (!result.failed()) return;
    std::fprintf(stderr, "[rank %d] %s failed at %s:%d: %s\n", rank_, name_.c_str(),
                 result.file_name() ? result.file_name() : "", result.line_number(), result.message());
  }

 private:
  int rank_;
  std::string name_;
};

}  // namespace

int main(int argc, char** argv) {
  int granted = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &granted);
  testing::InitGoogleTest(&argc, argv);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOnly(rank));
  }

  int failed = RUN_ALL_TESTS();
  int any_failed = 0;
  MPI_Allreduce(&failed, &any_failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return any_failed;
}
