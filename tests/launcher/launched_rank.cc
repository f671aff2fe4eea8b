// What the launcher's tests start as ranks. launched_rank DEED FOLDER [RANK NUMBER]: every rank leaves
// FOLDER/pid.<rank>, then the deed:
//   exit | abort | signal   RANK does it with NUMBER, the others wait for it in a barrier
//   error                   RANK logs one ERROR as our programs do, then aborts with NUMBER
//   count                   until USR1 comes; FOLDER/usr1.<rank> holds how often it came
//   stay                    ignores USR1 and TERM, for ever
//   late                    as count, but says that it is ready, and takes USR1, only after NUMBER ms
//   mute                    as count, but never says that it is ready
//   daemon                  rank RANK leaves a process of a session of its own behind, FOLDER/pid.daemon
//   recover                 RANK kills itself in the first NUMBER starts; FOLDER/starts grows by a letter a start
//   crash                   RANK aborts at step 7, in every start
//   choosy                  refuses worlds that are no multiple of NUMBER
//   faulty                  in the first start RANK enters itself as faulty in FOLDER/ledger.jsonl and ends with 79
//   record                  RANK leaves a failure record with code NUMBER and ends, without a word
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

#include <lockstep/base/launch_records.h>

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

int64_t count_start(const std::string& folder) {
  std::ofstream(folder + "/starts", std::ios::app) << 'x';
  std::ifstream file(folder + "/starts", std::ios::ate);
  return file.tellg();
}

void leave_daemon(const std::string& folder) {
  if (::fork() != 0) return;
  ::setsid();
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::close(fd);  // mpirun waits for their ends
  std::ofstream(folder + "/pid.daemon") << getpid() << std::endl;
  ::execl("/bin/sleep", "sleep", "600", nullptr);
  std::_Exit(1);
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
  if (deed != "late") std::signal(SIGUSR1, deed == "stay" ? SIG_IGN : &count);
  if (deed == "stay") std::signal(SIGTERM, SIG_IGN);
  const bool alone = std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr;
  const auto records = lockstep::LaunchRecords::from_environment(lockstep::process_environment());
  int rank = lockstep::rank_info_from_environment(lockstep::process_environment()).rank, size = 1;
  if (deed == "crash") {
    lockstep::note_step(7);
    records.record_crashes(rank, 9);
  }
  if (!alone) {
    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  }
  std::ofstream(folder + "/pid." + std::to_string(rank)) << getpid() << std::endl;
  if (deed == "late") {
    std::this_thread::sleep_for(std::chrono::milliseconds(number));
    std::signal(SIGUSR1, &count);
  }
  if (!alone) MPI_Barrier(MPI_COMM_WORLD);
  if (rank == 0 && deed != "mute") records.say_ready();
  if (deed == "exit" || deed == "abort" || deed == "signal" || deed == "error") {
    if (rank == who) fail(deed, rank, number, alone);
  } else if (deed == "record") {
    if (rank == who) records.say_failed(rank, number, "the disk of rank " + std::to_string(rank) + " is full");
    if (rank == who) fail("exit", rank, number, alone);
  } else if (deed == "faulty") {
    if (rank == who && count_start(folder) == 1) {
      std::ofstream(folder + "/ledger.jsonl") << R"({"event":"replica_fault","is_certain":true,"ranks":[)" << rank
                                              << R"(],"hosts":["as it calls itself"]})" << std::endl;
      fail("abort", rank, 79, alone);
    }
  } else if (deed == "recover") {
    if (rank == who && count_start(folder) <= number) std::raise(SIGKILL);
  } else if (deed == "crash") {
    if (rank == who) count_start(folder);
    if (rank == who) std::abort();
  } else if (deed == "choosy" && size % number != 0) {
    if (rank == 0) {  // the others wait for its word in the barrier
      records.say_failed(0, 78, std::to_string(size) + " ranks are no multiple");
      if (!alone) MPI_Abort(MPI_COMM_WORLD, 78);
      std::_Exit(78);
    }
  } else if (deed == "choosy") {
    if (rank == 0) std::ofstream(folder + "/size") << size << std::endl;
  } else if (deed == "daemon") {
    if (rank == who) leave_daemon(folder);
    for (int i = 0; i < 10; ++i) wait_a_moment();
  } else if (deed == "count" || deed == "late" || deed == "mute") {
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
  if (rank == 0) records.say_done(0);
  return 0;
}
