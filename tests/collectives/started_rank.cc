// What run_rank_test.py starts as ranks. started_rank DEED FOLDER [RANK]: every rank leaves FOLDER/pid.<rank>, then the
// deed; with RANK only that rank does it, the others wait in a barrier:
//   return, return9   end with 0, with 9
//   config, data, storage, peer, hang, fenced, check, standard, torch, number   throws that kind of error
//   flags     finds a mistake before run_rank(), rank 0 last of all
//   stop      until a stop is requested; FOLDER/stopped.<rank> says that it came
//   map       as stop, with 64 MiB of mapped memory
//   say       rank, size, back end and device on standard output
// DEVICE and BACKEND in the environment become the options of the same name.
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <thread>

#include <unistd.h>

#include <ATen/ops/full.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/runtime.h>

namespace {

using namespace lockstep;

void fail(const std::string& deed) {
  if (deed == "config") throw ConfigError("a flag is wrong");
  if (deed == "data") throw CorruptData("a shard is torn");
  if (deed == "storage") throw IoError("writing", "/full/disk", ENOSPC);
  if (deed == "peer") throw CollectiveError("a peer went away");
  if (deed == "hang") throw CollectiveError("all_reduce hangs", ExitCode::kHang);
  if (deed == "fenced") throw Fenced("a newer start owns the run");
  LOCKSTEP_CHECK(deed != "check") << "bucket 3";
  if (deed == "standard") throw std::runtime_error("nobody foresaw this");
  if (deed == "torch") at::full({2}, 1, at::kFloat).view({3});
  if (deed == "number") throw 7;  // NOLINT(hicpp-exception-baseclass): anything can be thrown
}

void wait_for_a_stop() {
  while (!stop_requested()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

std::string variable(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string deed = argv[1], folder = argv[2];
  const int who = argc > 3 ? std::atoi(argv[3]) : -1;
  if (deed == "flags") {
    const int me = rank_info_from_environment(process_environment()).rank;
    if (me == 0) std::this_thread::sleep_for(std::chrono::milliseconds(500));
    if (who == -1 || who == me) return report_before_run(ConfigError("a flag is wrong"));
  }
  return run_rank({.device = variable("DEVICE", "auto"), .backend = variable("BACKEND", "auto")},
                  [&](Runtime& runtime) {
                    const int rank = runtime.info().rank;
                    const int64_t mapped = deed == "map" ? 16 << 20 : 0;
                    const at::Tensor shown = runtime.world().empty_mapped(mapped, at::kFloat).fill_(1);
                    std::ofstream(folder + "/pid." + std::to_string(rank)) << getpid() << std::endl;
                    runtime.world().barrier();
                    if (deed == "stop" || deed == "map") {
                      wait_for_a_stop();
                      std::ofstream(folder + "/stopped." + std::to_string(rank)) << "yes" << std::endl;
                    } else if (deed == "say") {
                      std::cout << "rank " + std::to_string(runtime.world().rank()) + " of " +
                                       std::to_string(runtime.world().size()) + " on " + runtime.world().backend() +
                                       ", " + runtime.device().str() + "\n"
                                << std::flush;
                    } else if (who == -1 || who == rank) {
                      fail(deed);
                    }
                    runtime.world().barrier();
                    return deed.rfind("return", 0) == 0 ? std::atoi(deed.c_str() + 6) : 0;
                  });
}
