#include "batch_script.h"

#include <filesystem>
#include <regex>
#include <sstream>

namespace lockstep::launcher {
namespace {

void replace_all(std::string& text, const std::string& what, const std::string& with) {
  for (size_t at = 0; (at = text.find(what, at)) != std::string::npos; at += with.size())
    text.replace(at, what.size(), with);
}

// Slurm sends TERM (scancel, requeue, the end of a preempted job's grace) to every process of the job at once. Our
// ranks save on it; but Open MPI's daemons would end them within 2 s, so they never see it.
constexpr const char* kShield = R"(
shield=()
if env --block-signal=TERM true 2>/dev/null; then
  shield=(env --block-signal=TERM)
  export OMPI_MCA_orte_launch_agent="${shield[*]} orted" PRTE_MCA_prte_launch_agent="${shield[*]} prted"
fi
)";

// USR1: Slurm's warning before the end of the time limit or a preemption. The signal ends `wait` early, and its answer
// is not the job's then.
constexpr const char* kStart = R"( & job=$!
[ -z "$warned" ] || kill -USR1 "$job"
until wait "$job"; code=$?; [ $code -le 128 ]; do
  kill -0 "$job" 2>/dev/null || { wait "$job"; code=$?; break; }
done
trap '' USR1 TERM
)";

// scontrol works whether or not the cluster has RequeueExit=75; a job that was cancelled stays cancelled.
constexpr const char* kRequeue = R"(
if [ $code = 75 ] && [ -z "$cancelled" ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt @MAX@ ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
  else
    echo "lockstep: not put back into the queue again after @MAX@ times. Mend: lockstep submit --max_requeues" >&2
    code=77
  fi
fi
exit $code
)";

}  // namespace

std::string quoted_for_bash(const std::string& word) {
  std::string text = word;
  replace_all(text, "'", "'\\''");
  return "'" + text + "'";
}

std::string BatchScript::name() const {
  if (!job_name.empty()) return job_name;
  static const std::regex kOther("[^A-Za-z0-9_.-]");
  const std::string made = std::regex_replace(std::filesystem::path(program[0]).filename().string(), kOther, "_");
  return (made[0] == '.' || made[0] == '-' ? "_" + made : made).substr(0, 64);
}

std::string BatchScript::text() const {
  std::ostringstream text;
  text << "#!/bin/bash\n# Written by `lockstep submit`; sbatch takes it again.\n";
  const auto option = [&](const char* name, const std::string& value) {
    if (!value.empty() && value != "0") text << "#SBATCH --" << name << "=" << value << "\n";
  };
  option("job-name", name());
  option("nodes", std::to_string(nodes));
  option("ntasks-per-node", std::to_string(ranks_per_node));
  option("cpus-per-task", std::to_string(cpus_per_rank));
  option("gpus-per-node", std::to_string(gpus_per_node));
  option("time", time);
  option("partition", partition);
  option("account", account);
  option("array", array);
  static const std::regex kPlain("[A-Za-z0-9_./+=,@-]+");  // others are not for #SBATCH lines: Slurm's default then
  if (array.empty() && std::regex_match(run_dir, kPlain)) option("output", run_dir + "/slurm-%j.out");
  text << "#SBATCH --requeue --open-mode=append --signal=B:USR1@" << grace_s << "\n\n"
       << "job='' warned='' cancelled=''\n"
          "trap 'warned=1; ${job:+kill -USR1 $job}' USR1\n"
          "trap 'warned=1; cancelled=1; ${job:+kill -USR1 $job}' TERM\n"
       << kShield << "\"${shield[@]}\" ";
  text << quoted_for_bash(lockstep) << " run -n " << nodes * ranks_per_node << " --grace_s=" << grace_s << " --";
  for (const std::string& word : program) {
    std::string quoted = quoted_for_bash(word);
    if (!array.empty()) replace_all(quoted, "%a", "'\"$SLURM_ARRAY_TASK_ID\"'");
    text << " " << quoted;
  }
  std::string requeue = kRequeue;
  replace_all(requeue, "@MAX@", std::to_string(max_requeues));
  text << kStart << requeue;
  return text.str();
}

}  // namespace lockstep::launcher
