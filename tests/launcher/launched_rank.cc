// What the launcher's tests start as ranks. launched_rank DEED FOLDER [RANK NUMBER]: every rank leaves
// FOLDER/pid.<rank>, then the deed:
//   exit | abort | signal   RANK does it with NUMBER, the others wait for it in a barrier
//   error                   RANK logs one ERROR as our programs do, then aborts with NUMBER
//   count                   until USR1 comes; FOLDER/usr1.<rank> holds how often it came
//   stay                    ignores USR1 and TERM, for ever
//   say                     its arguments and environment, as lines on standard output; rank 0 also on standard error
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>

#include <unistd.h>

#include <mpi.h>

namespace {

volatile std::sig_atomic_t g_count = 0;
void count(int) { g_count = g_count + 1; }

void wait_a_moment() { std::this_thread::sleep_for(std::chrono::milliseconds(20)); }

[[noreturn]] void fail(const std::string& deed, int rank, int number, bool alone) {
  if (deed == "signal") std::raise(number);
  if (deed == "error")
    std::fprintf(stderr, "E 12:00:00.000 [rank %d/9] disk.cc:7] the disk of rank %d is full\n", rank, rank);
  if (deed != "exit" && !alone) MPI_Abort(MPI_COMM_WORLD, number);
  std::_Exit(number);
}

void say(int argc, char** argv) {
  for (int i = 2; i < argc; ++i) std::printf("argument %d: <%s>\n", i, argv[i]);
  for (const char* name : {"OMP_NUM_THREADS", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"}) {
    const char* value = std::getenv(name);
    std::printf("%s=%s\n", name, value ? value : "(unset)");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string deed = argv[1], folder = argv[2];
  const int who = argc > 3 ? std::atoi(argv[3]) : 0, number = argc > 4 ? std::atoi(argv[4]) : 0;
  std::signal(SIGUSR1, deed == "stay" ? SIG_IGN : &count);
  if (deed == "stay") std::signal(SIGTERM, SIG_IGN);
  const bool alone = std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr;
  int rank = 0;
  if (!alone) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  }
  std::ofstream(folder + "/pid." + std::to_string(rank)) << getpid() << std::endl;
  if (deed == "exit" || deed == "abort" || deed == "signal" || deed == "error") {
    if (rank == who) fail(deed, rank, number, alone);
  } else if (deed == "count") {
    while (g_count == 0) wait_a_moment();
    for (int i = 0; i < 10; ++i) wait_a_moment();  // a second one would come by now
    std::ofstream(folder + "/usr1." + std::to_string(rank)) << g_count << std::endl;
  } else if (deed == "stay") {
    for (;;) wait_a_moment();
  } else {
    say(argc, argv);
  }
  if (!alone) {
    MPI_Barrier(MPI_COMM_WORLD);
    MPI_Finalize();
  }
  return 0;
}
