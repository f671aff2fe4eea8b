#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <sstream>

#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/base/rank_info.h>

#include "machine.h"
#include "run_state.h"
#include "supervisor.h"
#include "verbs.h"

namespace lockstep::launcher {
namespace {

const std::vector<Arguments::Flag> kFlags = {
    {"n", "RANKS", "ranks to start; default: the slots of the hosts, on this machine one for each core it may use"},
    {"hosts", "a:4,b:4", "hosts and how many ranks each may hold, filled in this order; those beyond RANKS are spares"},
    {"hostfile", "FILE",
     "the same as Open MPI's: NAME slots=N, a host a line. Default: the Slurm allocation around, or "
     "this machine"},
    {"mpirun", "PATH", "the mpirun to use, Open MPI 4.1 or 5.0; default: the one on PATH"},
    {"restarts", "N",
     "how often to start again after a lost rank or host, a crash, a hang or a storage failure; begins anew whenever a "
     "checkpoint becomes durable (default 3; 0: never)"},
    {"min_ranks", "N",
     "go on with as few ranks when hosts are lost, in the largest world the program accepts (default: RANKS)"},
    {"grace_s", "SECONDS",
     "after TERM, INT, HUP or USR1: time the ranks get to save before they are ended (default 30)"},
    {"bind_to", "core|none", "bind each rank to a core of its own; with no more ranks than cores (default none)"},
    {"tag_output", nullptr, "every line begins with the rank that wrote it, for programs whose own lines do not say"},
};

void set_default(const char* name, const std::string& value) { ::setenv(name, value.c_str(), /*overwrite=*/0); }

// A program that runs alone must not take itself for a rank of whatever launcher this shell was started by.
void forget_outer_launchers() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "RANK", "WORLD_SIZE",
                           "SLURM_STEP_ID", "LOCKSTEP_RANK", "LOCKSTEP_WORLD_SIZE"}) {
    ::unsetenv(name);
  }
}

std::vector<std::string> expand_node_list(const std::string& list) {  // no shell: argv as it is
  const Answer answer = ask({"scontrol", "show", "hostnames", list});
  if (answer.exit_code != 0)
    throw ConfigError("scontrol cannot tell the nodes of SLURM_JOB_NODELIST=" + list + ": " + answer.output +
                      ". Mend: pass --hosts=a:4,b:4");
  std::vector<std::string> names;
  std::istringstream stream(answer.output);
  for (std::string name; stream >> name;) names.push_back(name);
  return names;
}

std::vector<Host> read_hostfile(const std::string& path, int64_t cores) {
  constexpr uint64_t kMaxBytes = 16 << 20;
  try {
    return parse_hostfile(read_text(real_fs(), path, kMaxBytes), cores);
  } catch (const IoError& error) {
    throw ConfigError(std::string("--hostfile: ") + error.what() + ". Mend: check the path");
  }
}

// Whether srun reaches all of these.
bool are_allocated(const std::vector<Host>& hosts) try {
  const std::vector<Host> nodes = slurm_hosts(process_environment(), &expand_node_list);
  return std::all_of(hosts.begin(), hosts.end(), [&](const Host& host) {
    return std::any_of(nodes.begin(), nodes.end(), [&](const Host& node) { return node.name == host.name; });
  });
} catch (const ConfigError&) {  // whose mend is to name hosts
  return false;
}

void find_hosts(Plan& plan, const Arguments& arguments) {
  if (arguments.has("hosts") && arguments.has("hostfile"))
    throw ConfigError("--hosts and --hostfile are both given. Mend: one of them");
  const Environment environment = process_environment();
  if (const auto list = arguments.find("hosts")) {
    plan.hosts = parse_host_list(*list);
    plan.in_slurm = are_allocated(plan.hosts);
  } else if (const auto file = arguments.find("hostfile")) {
    plan.hosts = read_hostfile(*file, plan.cores);
    plan.in_slurm = are_allocated(plan.hosts);
  } else {
    plan.hosts = slurm_hosts(environment, &expand_node_list);
    plan.in_slurm = !plan.hosts.empty();
  }
  // A batch script runs on the first node of its job; the shell of salloc may not.
  const auto node = environment("SLURMD_NODENAME");
  plan.on_this_machine = std::all_of(plan.hosts.begin(), plan.hosts.end(), [&](const Host& host) {
    return is_this_machine(host.name) || (plan.in_slurm && host.name == node);
  });
}

void size_world(Plan& plan, const Arguments& arguments) {
  constexpr int64_t kMostRanks = 65536;
  const int64_t slots = plan.hosts.empty() ? plan.cores : total_slots(plan.hosts);
  plan.ranks = arguments.number("n", std::min(slots, kMostRanks), 1, kMostRanks);
  if (plan.on_this_machine) {
    plan.hosts = {{"localhost", plan.ranks}};  // more than it has cores is its user's decision
  } else if (plan.ranks > slots) {
    throw ConfigError("-n " + std::to_string(plan.ranks) + " ranks on hosts with " + std::to_string(slots) +
                      " slots. Mend: more hosts, or more slots a host");
  }
  plan.min_ranks = arguments.number("min_ranks", plan.ranks, 1, plan.ranks);
  const std::string binding = arguments.get("bind_to", "none");
  if (binding != "none" && binding != "core") throw ConfigError("--bind_to=" + binding + " is neither core nor none");
  plan.bind_to_cores = binding == "core";
  if (plan.bind_to_cores && plan.on_this_machine && plan.ranks > plan.cores)
    throw ConfigError("--bind_to=core needs a core a rank, but " + std::to_string(plan.ranks) + " ranks share " +
                      std::to_string(plan.cores) + ". Mend: leave it out, or start fewer ranks");
}

std::string find_mpirun(const std::string& wanted) {
  std::string mpirun = find_program(wanted);
  if (mpirun.empty())
    throw ConfigError("'" + wanted +
                      "' is not there or cannot be executed. Mend: apt-get install openmpi-bin, or pass --mpirun PATH");
  return mpirun;
}

Plan plan(const Arguments& arguments) {
  if (!arguments.words().empty())
    throw ConfigError("leftover word '" + arguments.words()[0] +
                      "'. Mend: put -- before the program: lockstep run -n 2 -- PROGRAM FLAGS…");
  if (arguments.rest().empty()) throw ConfigError("no program is named. Mend: lockstep run -n 2 -- PROGRAM FLAGS…");
  Plan plan;
  plan.program = arguments.rest();
  plan.program[0] = find_program(arguments.rest()[0]);
  if (plan.program[0].empty())
    throw ConfigError("'" + arguments.rest()[0] +
                      "' is not there or cannot be executed. Mend: check the path, or build it");
  plan.cores = usable_cores();
  find_hosts(plan, arguments);
  size_world(plan, arguments);
  plan.restarts = arguments.number("restarts", 3, 0, 1'000'000);
  plan.grace = std::chrono::seconds(arguments.number("grace_s", 30, 0, 86400));
  plan.tag_output = arguments.has("tag_output");
  // Alone, MPI is not needed at all: 0.2 s less.
  if (plan.ranks > 1 || !plan.on_this_machine) plan.mpirun = find_mpirun(arguments.get("mpirun", "mpirun"));
  plan.run_dir = program_run_dir(plan.program);
  return plan;
}

int run(const Arguments& arguments) {
  const Plan job = plan(arguments);
  if (!arguments.has("n") && job.on_this_machine && !job.in_slurm)
    std::cerr << "lockstep: " << job.ranks << " ranks, one a core; -n chooses" << std::endl;
  set_default("OMP_NUM_THREADS", "1");
  set_default("LOCKSTEP_AGENT", std::filesystem::read_symlink("/proc/self/exe"));  // the hang watchdog of each node
  share_new_files(Share::kNone);                                                   // mpirun's files too
  // Ranks see a pipe where the launcher sees a terminal.
  if (::isatty(STDERR_FILENO)) ::setenv("LOCKSTEP_STDERR_IS_TERMINAL", "1", 1);
  if (job.mpirun.empty()) forget_outer_launchers();
  return supervise(job);
}

}  // namespace

const Verb kRun = {"run",
                   "run [-n RANKS] [--hosts a:4,b:4 | --hostfile F] [--restarts 3] [--min_ranks N] [--grace_s 30] … -- "
                   "PROGRAM FLAGS…",
                   "Starts PROGRAM on RANKS ranks and passes its exit code on; starts it again from the last durable "
                   "checkpoint when ranks or hosts are lost.",
                   &kFlags, &run};

}  // namespace lockstep::launcher
