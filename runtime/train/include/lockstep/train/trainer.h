#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/train/options.h>
#include <lockstep/train/task.h>

namespace lockstep::train {

/// How a run ended, on every rank.
struct Result {
  int64_t steps = 0;               ///< finished in total
  int64_t resumed_from = -1;       ///< step of the checkpoint taken up, -1: fresh
  double loss = 0;                 ///< last training loss, per counted unit
  double validation_loss = 0;      ///< nan without validation data
  double validation_accuracy = 0;  ///< nan unless the task counts right answers
  double train_seconds = 0;
};

/// Trains `task` to the end on the ranks of `world`: every rank calls it with its own task and equal options.
///
/// Resumes from the newest durable checkpoint of the run directory, or says that the run is done. Writes what DESIGN 4
/// lists there.
/// @throws Preempted after saving, when SIGUSR1 or SIGTERM came. @throws ConfigError, CorruptData, IoError,
/// CollectiveError.
Result train(ProcessGroup& world, at::Device device, Task& task, const Options& options, Fs& fs = real_fs());

/// The main() of a training program: parse_flags(), run_rank() around train(), and the exit code.
/// @param own_file the program's flags.cc, for --help. @param make_task called after flags are parsed, once a rank.
int run_training(int argc, char** argv, const char* usage, const char* own_file,
                 const std::function<std::unique_ptr<Task>()>& make_task);

}  // namespace lockstep::train
