#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <regex>
#include <sstream>

#include <sys/stat.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

#include "batch_script.h"
#include "machine.h"
#include "run_state.h"
#include "verbs.h"

namespace lockstep::launcher {
namespace {

namespace files = std::filesystem;

const std::vector<Arguments::Flag> kFlags = {
    {"nodes", "N", "nodes to ask for (default 1)"},
    {"ranks_per_node", "M", "ranks on each (default 1)"},
    {"cpus_per_rank", "C", "cores of each rank (default: Slurm's)"},
    {"gpus_per_node", "G", "GPUs of each node (default: none)"},
    {"time", "LIMIT", "of one start, as Slurm writes it: 90, 2:00:00, 1-12 (default: the partition's)"},
    {"partition", "NAMES", "(default: Slurm's)"},
    {"account", "NAME", "(default: Slurm's)"},
    {"job_name", "NAME", "(default: the program's)"},
    {"array", "TASKS", "as Slurm writes it: 0-7%2; each %a in the program's words becomes the task's number"},
    {"grace_s", "SECONDS",
     "from Slurm's warning to the end of the time limit (default: from what a save in RUN_DIR took; else 90)"},
    {"max_requeues", "N", "how often a job that stopped and saved is put back into the queue (default 100)"},
    {"dry_run", nullptr, "print the script; write and submit nothing"},
};

// These land in #SBATCH lines, where nothing is quoted.
std::string checked(const Arguments& arguments, const char* flag, const char* pattern, const char* mend) {
  std::string value = arguments.get(flag, "");
  if (value.empty() && !arguments.has(flag)) return value;
  if (value.size() <= 64 && std::regex_match(value, std::regex(pattern))) return value;
  throw ConfigError("--" + std::string(flag) + "='" + value + "' is not allowed. Mend: " + mend);
}

// What the warning leaves time for: the step that goes on, the save, and both being twice as slow as last time. Slurm
// may warn up to a minute earlier, never later.
int64_t measured_grace_s(const std::string& run_dir) {
  const double save_s = last_save_seconds(run_dir);
  if (save_s <= 0) return 90;
  const double step_s = last_step_seconds(run_dir);
  return std::clamp<int64_t>(30 + static_cast<int64_t>(std::ceil(2 * (save_s + step_s))), 60, int64_t{6} * 3600);
}

// Slurm's "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours", "days-hours:minutes[:seconds]".
int64_t limit_seconds(const std::string& limit) {
  const size_t dash = limit.find('-');
  int64_t days = 0;
  std::vector<int64_t> parts;
  std::istringstream text(dash == std::string::npos ? limit : limit.substr(dash + 1));
  for (std::string part; std::getline(text, part, ':');) parts.push_back(std::stoll(part));
  if (dash != std::string::npos) days = std::stoll(limit.substr(0, dash));
  const bool minutes_first = dash == std::string::npos && parts.size() < 3;
  parts.resize(3);
  const int64_t unit = minutes_first ? 60 : 3600;
  return days * 86400 + parts[0] * unit + parts[1] * unit / 60 + parts[2];
}

BatchScript plan(const Arguments& arguments) {
  if (!arguments.words().empty())
    throw ConfigError("leftover word '" + arguments.words()[0] +
                      "'. Mend: put -- before the program: lockstep submit --nodes 2 -- PROGRAM FLAGS…");
  if (arguments.rest().empty())
    throw ConfigError("no program is named. Mend: lockstep submit --nodes 2 -- PROGRAM FLAGS…");
  BatchScript script;
  script.program = arguments.rest();
  if (script.program[0] = find_program(arguments.rest()[0]); script.program[0].empty())
    throw ConfigError("'" + arguments.rest()[0] +
                      "' is not there or cannot be executed. Mend: check the path, or build it");
  constexpr const char* kName = "[A-Za-z0-9_][A-Za-z0-9_.-]*";
  script.nodes = arguments.number("nodes", 1, 1, 65536);
  script.ranks_per_node = arguments.number("ranks_per_node", 1, 1, 1024);
  script.cpus_per_rank = arguments.number("cpus_per_rank", 0, 1, 1024);
  script.gpus_per_node = arguments.number("gpus_per_node", 0, 1, 1024);
  script.time =
      checked(arguments, "time", "([0-9]{1,5}-)?[0-9]{1,7}(:[0-9]{1,2}){0,2}", "as in 90, 2:00:00 or 1-12:00");
  script.partition = checked(arguments, "partition", "[A-Za-z0-9_][A-Za-z0-9_.,-]*", "letters, digits and _.,-");
  script.account = checked(arguments, "account", kName, "letters, digits and _.-");
  script.job_name = checked(arguments, "job_name", kName, "letters, digits and _.-, 64 at most");
  script.array = checked(arguments, "array", "[0-9][0-9,:-]*(%[1-9][0-9]*)?", "as in 0-7, 1,3,5 or 0-15%4");
  script.max_requeues = arguments.number("max_requeues", 100, 0, 1000000);
  script.run_dir = program_flag(script.program, "run_dir").value_or("");
  const bool names_task = std::any_of(script.program.begin(), script.program.end(), [](const std::string& word) {
    return word.find("%a") != std::string::npos;  // in a flagfile nobody replaces it
  });
  if (!script.array.empty() && (!names_task || script.run_dir.find("%a") == std::string::npos))
    throw ConfigError("the tasks of an array would share one run (--run_dir='" + script.run_dir +
                      "'). Mend: a folder each, as in --run_dir=sweep/%a; %a is the task's number");
  script.grace_s = arguments.number("grace_s", measured_grace_s(program_run_dir(script.program)), 1, 86400);
  if (!script.time.empty() && limit_seconds(script.time) <= script.grace_s)
    throw ConfigError("--time=" + script.time + " is no longer than the " + std::to_string(script.grace_s) +
                      " s from the warning to the end. Mend: a longer --time, or a shorter --grace_s");
  script.lockstep = files::read_symlink("/proc/self/exe");
  return script;
}

std::string write_script(const BatchScript& script) {
  const bool has_folder = !script.run_dir.empty() && script.array.empty();
  std::string path = (has_folder ? script.run_dir + "/" : "") + script.name() + ".sbatch";
  share_new_files(Share::kNone);
  std::error_code error;
  if (has_folder) files::create_directories(script.run_dir, error);
  std::ofstream file(path, std::ios::trunc);
  file << script.text() << std::flush;
  if (!file)
    throw ConfigError("cannot write " + path + ". Mend: go to a folder you may write, or name another --run_dir");
  return path;
}

int submit(const Arguments& arguments) {
  const BatchScript script = plan(arguments);
  if (arguments.has("dry_run")) {
    std::cout << script.text();
    return 0;
  }
  if (find_program("sbatch").empty())
    throw ConfigError("no sbatch on PATH. Mend: submit from a login node of a Slurm cluster, or look with --dry_run");
  const std::string path = write_script(script);
  const Answer answer = ask({"sbatch", "--parsable", path});
  std::smatch id;  // after warnings, if any; "JOB;CLUSTER" where there are several
  static const std::regex kId("(?:^|\n)([0-9]+)(;[^\n]*)?\n?$");
  if (answer.exit_code != 0 || !std::regex_search(answer.output, id, kId))
    throw ConfigError("sbatch refused " + path + ": " + answer.output +
                      "Mend: as Slurm says; other options of sbatch are "
                      "taken from its environment variables, as in SBATCH_QOS=long");
  std::cerr << id.prefix();
  std::cout << id[1] << "\n";
  return 0;
}

}  // namespace

const Verb kSubmit = {"submit",
                      "submit [--nodes 1] [--ranks_per_node 1] [--time 2:00:00] [--partition P] [--array 0-3] "
                      "[--dry_run] … -- PROGRAM FLAGS…",
                      "Submits PROGRAM to Slurm as a job that stops in time, saves, and goes back into the queue; "
                      "prints the job's number. "
                      "The script stays in RUN_DIR, or here.",
                      &kFlags, &submit};

}  // namespace lockstep::launcher
