#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep::launcher {

/// A job for sbatch. Texts that reach #SBATCH lines have been checked; words of the program may hold anything.
struct BatchScript {
  int64_t nodes = 1, ranks_per_node = 1;
  int64_t cpus_per_rank = 0, gpus_per_node = 0;           ///< 0: not asked for
  std::string time, partition, account, job_name, array;  ///< empty: Slurm's default
  int64_t grace_s = 90;                                   ///< from the warning to the end
  int64_t max_requeues = 100;
  std::string lockstep;              ///< path of this program
  std::vector<std::string> program;  ///< argv; in an array %a becomes the task's number
  std::string run_dir;               ///< of the program; empty: none

  std::string name() const;  ///< job_name, else made from the program's
  std::string text() const;
};

/// `word` as bash reads it back: the same bytes, whatever they are.
std::string quoted_for_bash(const std::string& word);

}  // namespace lockstep::launcher
