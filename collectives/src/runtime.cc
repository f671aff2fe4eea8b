#include <csignal>
#include <cstdlib>
#include <iostream>
#include <thread>

#include <sys/prctl.h>
#include <unistd.h>

#include <mpi.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/base/launch_records.h>
#include <lockstep/base/log.h>
#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/collectives/runtime.h>
#include <lockstep/collectives/shm_group.h>

#include "flight_recorder.h"
#include "id_exchange.h"
#include "mpi_handles.h"
#include "placement.h"

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

void start_mpi(const RankInfo& info) {
  int granted = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &granted);
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  check_world(info, rank, size);
  if (granted < MPI_THREAD_MULTIPLE)
    throw ConfigError("this MPI grants thread level " + std::to_string(granted) +
                      ", MPI_THREAD_MULTIPLE is needed. Mend: use an Open MPI built with threads");
}

// With --device=auto each rank looks for itself; one without a GPU keeps all on the CPU, for all must talk one way.
Placement agree(Placement mine, const RankInfo& info) {
  int on_gpu = mine.is_on_gpu ? 1 : 0, number = 0;
  check_mpi(MPI_Allreduce(&on_gpu, &number, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD), "counting ranks with a GPU");
  if (number == info.world_size) return mine;
  if (number > 0 && info.rank == 0) {
    LOG(WARNING) << "only " << number << " of " << info.world_size
                 << " ranks have a GPU: all stay on the CPU. Mend: --device=cpu to say that this is meant";
  }
  return {};
}

std::unique_ptr<ProcessGroup> make_nccl_world(const RankInfo& info, const RuntimeOptions& options,
                                              const CudaPlugin& plugin, int device) {
  const Environment environment = process_environment();
  if (environment("NCCL_COMM_ID")) {  // it replaces the random secret in the handshake by a constant that is public
    throw ConfigError("NCCL_COMM_ID is set: any program that reaches the port could join this job. Mend: unset it");
  }
  setenv("NCCL_RAS_ENABLE", "0", /*overwrite=*/0);  // it would tell every user of the node how the job is laid out
  NcclWorld world{info.rank, info.world_size, device, options.collective_timeout, nullptr};
  world.share_id = [&](std::span<std::byte> id) {
    if (info.has_mpi) {
      check_mpi(MPI_Bcast(id.data(), static_cast<int>(id.size()), MPI_BYTE, 0, MPI_COMM_WORLD), "sharing NCCL's id");
    } else {
      exchange_id(meeting_place(environment), info.rank, info.world_size, id, options.collective_timeout);
    }
  };
  return plugin.make_nccl_world(world);
}

// The ranks of a CPU run under MPI.
std::unique_ptr<ProcessGroup> make_cpu_world(const RankInfo& info, const RuntimeOptions& options) {
  auto world = make_mpi_world();
  world->set_control_timeout(options.collective_timeout);  // before it is made the base of others
  if (options.backend == "mpi") return world;
  const std::vector<int> nodes = node_of_ranks(*world);
  const CpuBackend backend = choose_cpu_backend(options, nodes);
  try {
    if (backend == CpuBackend::kShm) return make_shm_group(std::move(world));
    if (backend == CpuBackend::kTwoLevel) return make_two_level_group(std::move(world), nodes);
    return world;
  } catch (const ConfigError& error) {  // thrown on all ranks alike
    if (options.backend == "shm") throw;
    LOG_IF(WARNING, info.rank == 0) << "without shared memory: " << error.what();
    auto plain = make_mpi_world();
    plain->set_control_timeout(options.collective_timeout);
    return plain;
  }
}

std::unique_ptr<Runtime> start_runtime(const RankInfo& info, const RuntimeOptions& options, FlightRecorder* recorder) {
  // Before torch is used for anything: asked for CUDA without the plug-in, it would say no for ever. And before cuBLAS
  // is: with another workspace its products may have other bits from run to run.
  if (may_use_gpu(options)) setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  const CudaState cuda = may_use_gpu(options) ? load_cuda_plugin() : CudaState{};
  if (cuda.has_driver && cuda.plugin == nullptr && info.rank == 0) LOG(WARNING) << cuda.why;
  Placement placement = choose_placement(options, info, cuda);
  configure_arithmetic(1);
  if (info.has_mpi) {  // alone it is not even started: nothing to wait for, and 0.1 s saved
    start_mpi(info);
    placement = agree(placement, info);
  }
  at::Device device = at::kCPU;
  if (placement.is_on_gpu) {
    // Where the batch system shows each rank its own GPU alone, that is number 0 for all.
    device = at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(info.local_rank % cuda.plugin->device_count()));
    cuda.plugin->set_device(device.index());
  }
  std::unique_ptr<ProcessGroup> world;
  if (placement.is_over_nccl) {
    world = make_nccl_world(info, options, *cuda.plugin, device.index());
  } else {
    world = info.has_mpi && !placement.is_on_gpu ? make_cpu_world(info, options) : std::move(make_local_world(1)[0]);
  }
  if (recorder != nullptr) world = recorder->watch(std::move(world));
  return std::make_unique<Runtime>(info, device, std::move(world));
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
  install_stop_handlers();        // first: a signal before this would kill the rank
  share_new_files(Share::kNone);  // before MPI and the log make files
  const LaunchRecords records = LaunchRecords::from_environment(process_environment());
  std::unique_ptr<FlightRecorder> recorder;
  std::unique_ptr<Runtime> runtime;
  int rank = 0;
  try {
    const RankInfo info = rank_info_from_environment(process_environment());
    rank = info.rank;
    start_logging("lockstep", info.rank, info.world_size);
    records.record_crashes(info.rank, info.world_size);  // before MPI, which takes over only what nobody has
    if (info.has_mpi && info.launcher != "srun") prctl(PR_SET_PDEATHSIG, SIGKILL);  // no rank outlives its mpirun
    recorder = FlightRecorder::start(info, options);
    runtime = start_runtime(info, options, recorder.get());
    if (rank == 0) records.say_ready();
    int code = 0;
    try {
      code = body(*runtime);
    } catch (const Preempted& stop) {
      LOG_IF(INFO, rank == 0) << stop.what();
      code = static_cast<int>(stop.exit_code());
    }
    runtime->world().close();
    if (recorder) recorder->note_end(code, "");
    if (mpi_is_up()) MPI_Finalize();
    if (rank == 0) records.say_done(code);
    return code;
  } catch (...) {
    const Failure failure = describe_current_exception();
    const int code = static_cast<int>(failure.code);
    if (recorder) recorder->note_end(code, failure.message);
    if (failure.code != ExitCode::kConfig || rank == 0 || !rank_zero_says_it()) {
      records.say_failed(rank, code, failure.message);  // first: standard error may be lost
      LOG(ERROR) << failure.message;
    }
    if (runtime) runtime->world().abort();
    google::FlushLogFiles(google::INFO);
    if (mpi_is_up()) MPI_Abort(MPI_COMM_WORLD, code);
    std::_Exit(code);  // destructors could wait for peers that are gone
  }
}

int report_before_run(const Error& error) {
  install_stop_handlers();
  const int code = static_cast<int>(error.exit_code()), rank = rank_info_from_environment(process_environment()).rank;
  if (rank == 0 || !rank_zero_says_it()) {
    LaunchRecords::from_environment(process_environment()).say_failed(rank, code, error.what());
    std::cerr << program_invocation_name << ": " << error.what() << std::endl;
  }
  return code;
}

}  // namespace lockstep
