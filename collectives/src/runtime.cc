#include <csignal>
#include <thread>

#include <sys/prctl.h>
#include <unistd.h>

#include <mpi.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/runtime.h>

namespace lockstep {
namespace {

volatile std::sig_atomic_t g_stop = 0;  // the one thing a signal handler may touch

void ask_to_stop(int signal) { g_stop = signal; }

void install_stop_handlers() {
  struct sigaction action {};
  action.sa_handler = &ask_to_stop;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

// Alone, MPI is not even started: nothing to wait for, and 0.1 s saved.
std::unique_ptr<ProcessGroup> make_world(const RankInfo& info, const RuntimeOptions& options) {
  if (options.backend != "auto" && options.backend != "mpi" && options.backend != "nccl") {
    throw ConfigError("--backend=" + options.backend + " is neither auto, mpi nor nccl");
  }
  if (info.world_size > 1 && !info.has_mpi) {
    throw ConfigError("started by " + info.launcher + " with " + std::to_string(info.world_size) +
                      " ranks, but without MPI there is only NCCL, and this is a CPU run. Mend: lockstep run -n " +
                      std::to_string(info.world_size) + " -- PROGRAM FLAGS, or mpirun");
  }
  if (!info.has_mpi) return std::move(make_local_world(1)[0]);
  int granted = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &granted);
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  check_world(info, rank, size);
  if (granted < MPI_THREAD_MULTIPLE)
    throw ConfigError("this MPI grants thread level " + std::to_string(granted) +
                      ", MPI_THREAD_MULTIPLE is needed. Mend: use an Open MPI built with threads");
  return make_mpi_world();
}

// A mistake in flags or files mostly shows on every rank alike: rank 0 says it and the job is taken down, with SIGTERM
// and a second later SIGKILL. A rank that is still there after 3 s is alone with its mistake (a file missing on its
// node) and must speak. SIGTERM may have come before this is called: then SIGKILL ends the wait.
bool rank_zero_says_it() {
  g_stop = 0;
  for (int i = 0; i < 300 && g_stop != SIGTERM; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  return g_stop == SIGTERM;
}

bool mpi_is_up() {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

}  // namespace

bool stop_requested() noexcept { return g_stop != 0; }

Runtime::Runtime(RankInfo info, at::Device device, std::unique_ptr<ProcessGroup> world)
    : info_(std::move(info)), device_(device), world_(std::move(world)) {}
Runtime::~Runtime() = default;

int run_rank(const RuntimeOptions& options, const std::function<int(Runtime&)>& body) {
  install_stop_handlers();  // first: a signal before this would kill the rank
  std::unique_ptr<Runtime> runtime;
  int rank = 0;
  try {
    const RankInfo info = rank_info_from_environment(process_environment());
    rank = info.rank;
    start_logging("lockstep", info.rank, info.world_size);
    if (info.has_mpi && info.launcher != "srun") prctl(PR_SET_PDEATHSIG, SIGKILL);  // no rank outlives its mpirun
    if (options.device != "auto" && options.device != "cpu" && options.device != "cuda")
      throw ConfigError("--device=" + options.device + " is neither auto, cpu nor cuda");
    if (options.device == "cuda" || options.backend == "nccl") {
      throw ConfigError(
          "--device=cuda needs the CUDA plug-in and a driver, and there is none here. Mend: run on a machine with a "
          "GPU, or --device=cpu");
    }
    configure_arithmetic(1);
    runtime = std::make_unique<Runtime>(info, at::kCPU, make_world(info, options));
    const int code = body(*runtime);
    runtime->world().close();
    if (mpi_is_up()) MPI_Finalize();
    return code;
  } catch (...) {
    const Failure failure = describe_current_exception();
    const int code = static_cast<int>(failure.code);
    if (failure.code != ExitCode::kConfig || rank == 0 || !rank_zero_says_it()) LOG(ERROR) << failure.message;
    if (runtime) runtime->world().abort();
    google::FlushLogFiles(google::INFO);
    if (mpi_is_up()) MPI_Abort(MPI_COMM_WORLD, code);
    std::_Exit(code);  // destructors could wait for peers that are gone
  }
}

}  // namespace lockstep
