#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/base/process.h>
#include <lockstep/train/flags.h>
#include <lockstep/train/trainer.h>

namespace lockstep::train {

int run_training(int argc, char** argv, const char* usage, const char* own_file,
                 const std::function<std::unique_ptr<Task>()>& make_task) {
  Options options;
  try {
    parse_flags(argc, argv, usage, own_file);
    options = options_from_flags();
    if (options.runtime.device == "auto") options.runtime.device = "cpu";  // where the step's kernels are so far
  } catch (const Error& error) {
    return report_before_run(error);
  }
  if (!options.core_dumps) forbid_core_dumps();
  return run_rank(options.runtime, [&](Runtime& runtime) {
    if (runtime.world().rank() == 0) {
      VLOG(1) << "flags:\n" << shared_flags();
      if (options.core_dumps)
        LOG(INFO) << "a crash leaves a core file, as '" << core_pattern() << "'; see ulimit -c too";
    }
    const auto task = make_task();
    train(runtime.world(), runtime.device(), *task, options);
    return 0;
  });
}

}  // namespace lockstep::train
