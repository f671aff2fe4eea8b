#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <sstream>

#include <lockstep/base/error.h>
#include <lockstep/base/rank_info.h>

namespace lockstep {
namespace {

std::optional<int> number(const Environment& environment, const char* name) {
  const auto text = name == nullptr ? std::nullopt : environment(name);
  if (!text) return std::nullopt;
  int value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size() || value < 0) {
    throw ConfigError(std::string("environment variable ") + name + "='" + *text +
                      "' is no rank or size. Mend: unset it, or start through a launcher");
  }
  return value;
}

// The variables of one launcher. world_size decides whether it is the one.
struct Names {
  const char* launcher;
  bool has_mpi;
  const char *rank, *world_size, *local_rank, *local_size, *node_rank;
};

constexpr Names kLaunchers[] = {
    {"lockstep", true, "LOCKSTEP_RANK", "LOCKSTEP_WORLD_SIZE", "LOCKSTEP_LOCAL_RANK", "LOCKSTEP_LOCAL_SIZE",
     "LOCKSTEP_NODE_RANK"},
    {"mpirun", true, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", nullptr},  // OMPI_COMM_WORLD_NODE_RANK numbers the processes of a node, not nodes
    {"torchrun", false, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"},
    {"srun", true, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"},
};

// SLURM_STEP_TASKS_PER_NODE lists tasks node by node, runs of equal ones folded: "4(x2),3" is 4, 4, 3.
std::optional<int> slurm_tasks_on(int node, const Environment& environment) {
  std::istringstream list(environment("SLURM_STEP_TASKS_PER_NODE").value_or(""));
  for (std::string item; std::getline(list, item, ',');) {
    int tasks = 0, nodes = 1;
    if (std::sscanf(item.c_str(), "%d(x%d)", &tasks, &nodes) < 1) return std::nullopt;  // NOLINT(cert-err34-c)
    if (node < nodes) return tasks;
    node -= nodes;
  }
  return std::nullopt;
}

}  // namespace

Environment process_environment() {
  return [](const char* name) -> std::optional<std::string> {
    const char* value = std::getenv(name);
    return value ? std::optional<std::string>(value) : std::nullopt;
  };
}

RankInfo rank_info_from_environment(const Environment& environment) {
  for (const Names& names : kLaunchers) {
    const auto world_size = number(environment, names.world_size), rank = number(environment, names.rank);
    if (!world_size || !rank) continue;
    // A shell inside an salloc or sbatch has Slurm's variables but is no task of a step: only srun sets SLURM_STEP_ID.
    const bool is_srun = std::string(names.launcher) == "srun";
    if (is_srun && !environment("SLURM_STEP_ID") && !environment("PMIX_RANK")) continue;
    RankInfo info;
    info.launcher = names.launcher;
    info.has_mpi = names.has_mpi;
    info.rank = *rank;
    info.world_size = *world_size;
    info.local_rank = number(environment, names.local_rank).value_or(*rank);
    info.node_rank = number(environment, names.node_rank).value_or(0);
    info.local_size = is_srun ? slurm_tasks_on(info.node_rank, environment).value_or(*world_size)
                              : number(environment, names.local_size).value_or(*world_size);
    if (info.rank >= info.world_size || info.local_rank >= info.local_size) {
      throw ConfigError(std::string(names.rank) + "=" + std::to_string(info.rank) + " and " + names.world_size + "=" +
                        std::to_string(info.world_size) + " (local " + std::to_string(info.local_rank) + " of " +
                        std::to_string(info.local_size) +
                        ") contradict each other. Mend: unset them, or start through a launcher");
    }
    return info;
  }
  return {};
}

void check_world(const RankInfo& announced, int mpi_rank, int mpi_world_size) {
  if (announced.world_size == mpi_world_size && announced.rank == mpi_rank) return;
  throw ConfigError("the environment of " + announced.launcher + " says rank " + std::to_string(announced.rank) +
                    " of " + std::to_string(announced.world_size) + ", but MPI sees rank " + std::to_string(mpi_rank) +
                    " of " + std::to_string(mpi_world_size) +
                    ": each rank would train alone. Mend: start with the mpirun of the Open MPI this program links, or "
                    "with srun --mpi=pmix");
}

}  // namespace lockstep
