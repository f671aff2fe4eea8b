#include <cstdlib>
#include <iostream>

#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

#include "job.h"
#include "machine.h"
#include "verbs.h"

namespace lockstep::launcher {
namespace {

const std::vector<Arguments::Flag> kFlags = {
    {"n", "RANKS", "ranks to start on this machine; default: one for each core this process may use"},
    {"mpirun", "PATH", "the mpirun to use, Open MPI 4.1 or 5.0; default: the one on PATH"},
    {"grace_s", "SECONDS",
     "after TERM, INT, HUP or USR1: time the ranks get to save before they are ended (default 30)"},
    {"tag_output", nullptr, "every line begins with the rank that wrote it, for programs whose own lines do not say"},
};

void set_default(const char* name, const std::string& value) { ::setenv(name, value.c_str(), /*overwrite=*/0); }

// What Open MPI should know, by environment: no version has to be asked for, as each reads only its own names (4.x the
// OMPI_MCA_ ones, 5.x the PRTE_MCA_ ones for what mpirun does). A user's own settings win.
void prepare_environment(int64_t ranks, int cores) {
  set_default("OMPI_ALLOW_RUN_AS_ROOT", "1");
  set_default("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
  set_default("OMPI_MCA_rmaps_base_oversubscribe", "1");
  set_default("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
  // No binding: Open MPI's default pins the first core for every job on the machine, and two jobs then share it.
  set_default("OMPI_MCA_hwloc_base_binding_policy", "none");
  set_default("PRTE_MCA_hwloc_default_binding_policy", "none");
  if (ranks > cores)
    set_default("OMPI_MCA_mpi_yield_when_idle", "1");  // a waiting rank must not keep the core from a working one
  // One host: nothing but shared memory is needed, and looking for networks, displays and OpenCL takes a third of a
  // start.
  set_default("OMPI_MCA_btl", "self,vader");
  set_default("OMPI_MCA_pml", "ob1");
  set_default("OMPI_MCA_plm", "isolated");
  set_default("HWLOC_COMPONENTS", "-gl,-opencl");
  // Ranks see a pipe where the launcher sees a terminal.
  if (::isatty(STDERR_FILENO)) ::setenv("LOCKSTEP_STDERR_IS_TERMINAL", "1", 1);
}

// A program that runs alone must not take itself for a rank of whatever launcher this shell was started by.
void forget_outer_launchers() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "RANK", "WORLD_SIZE",
                           "SLURM_STEP_ID", "LOCKSTEP_RANK", "LOCKSTEP_WORLD_SIZE"}) {
    ::unsetenv(name);
  }
}

Job plan(const Arguments& arguments, int64_t ranks) {
  if (!arguments.words().empty())
    throw ConfigError("leftover word '" + arguments.words()[0] +
                      "'. Mend: put -- before the program: lockstep run -n 2 -- PROGRAM FLAGS…");
  if (arguments.rest().empty()) throw ConfigError("no program is named. Mend: lockstep run -n 2 -- PROGRAM FLAGS…");
  const std::string program = find_program(arguments.rest()[0]);
  if (program.empty())
    throw ConfigError("'" + arguments.rest()[0] +
                      "' is not there or cannot be executed. Mend: check the path, or build it");
  Job job;
  job.grace = std::chrono::seconds(arguments.number("grace_s", 30, 0, 86400));
  job.under_mpirun = ranks > 1;  // alone, MPI is not needed at all: 0.2 s less
  if (job.under_mpirun) {
    const std::string wanted = arguments.get("mpirun", "mpirun"), mpirun = find_program(wanted);
    if (mpirun.empty())
      throw ConfigError(
          "'" + wanted +
          "' is not there or cannot be executed. Mend: apt-get install openmpi-bin, or pass --mpirun PATH");
    job.command = {mpirun, "-n", std::to_string(ranks)};
    if (arguments.has("tag_output")) job.command.emplace_back("--tag-output");
  }
  job.command.push_back(program);
  job.command.insert(job.command.end(), arguments.rest().begin() + 1, arguments.rest().end());
  return job;
}

int run(const Arguments& arguments) {
  const int cores = usable_cores();
  const int64_t ranks = arguments.number("n", cores, 1, 65536);
  const Job job = plan(arguments, ranks);
  if (!arguments.has("n")) std::cerr << "lockstep: " << ranks << " ranks, one a core; -n chooses" << std::endl;
  set_default("OMP_NUM_THREADS", "1");
  share_new_files(Share::kNone);  // mpirun's files too
  if (job.under_mpirun) {
    prepare_environment(ranks, cores);
  } else {
    forget_outer_launchers();
  }
  const JobEnd end = run_job(job);
  if (end.exit_code == 0) return 0;
  if (end.first_failure) std::cerr << "lockstep: first failure: " << *end.first_failure << "\n";
  std::cerr << "lockstep: the job ended with exit code " << end.exit_code
            << (end.exit_code == static_cast<int>(ExitCode::kRunAgain) ? "; run the same command again to go on" : "")
            << "\n";
  return end.exit_code;
}

}  // namespace

const Verb kRun = {"run", "run [-n RANKS] [--mpirun PATH] [--grace_s 30] [--tag_output] -- PROGRAM FLAGS…",
                   "Starts PROGRAM on RANKS ranks of this machine and passes its exit code on.", &kFlags, &run};

}  // namespace lockstep::launcher
