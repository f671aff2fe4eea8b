#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

namespace lockstep::metrics {

/// Upper bounds of the step-time histogram in seconds, 1-2.5-5 a decade: small models on fast devices to the largest.
inline constexpr std::array kStepBounds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,  0.25, 0.5,  1.0,
                                           2.5,   5.0,    10.0,  25.0, 50.0,  100., 250., 500., 1000.};

/// What stays as it is while a run goes on.
struct RunFacts {
  std::string count_unit = "samples";  ///< what the task counts, e.g. "tokens": part of metric names
  std::string libtorch;                ///< its version
  int64_t planned_steps = 0;
  int64_t samples_per_step = 0;
  int world_size = 1;
  uint64_t incarnation = 0;                     ///< which start of the run this is: its fencing epoch
  int64_t first_step = 0;                       ///< steps that earlier starts have finished
  int64_t durable_step = -1;                    ///< of them, in the newest durable checkpoint of this run; -1: none
  std::chrono::milliseconds patience{300'000};  ///< RunMeter::health()
};

/// A finished step.
struct StepFigures {
  int64_t step = 0;  ///< finished so far, in all starts
  double loss = 0, grad_norm = 0, learning_rate = 0;
  double accuracy = std::numeric_limits<double>::quiet_NaN();  ///< nan: the task counts no right answers
  int64_t count = 0;                                           ///< of RunFacts::count_unit
  double seconds = 0;
  int64_t memory_bytes = 0;     ///< resident, of this process
  int64_t straggler_rank = -1;  ///< the rank that computed longest in the last 20 steps; -1: not known
  double straggler_ratio = 1;   ///< its compute time over the median rank's
};

/// A finished save, durable or failed.
struct SaveFigures {
  int64_t step = 0;
  bool is_durable = false;
  double seconds = 0, stall_seconds = 0;  ///< in all; of them, training held up
};

/// All that a RunMeter knows at one moment. Counts are of this start, but for `step`.
struct RunFigures {
  StepFigures last;
  int64_t steps = 0, skipped_steps = 0, counted = 0;
  std::array<int64_t, kStepBounds.size() + 1> step_histogram{};  ///< steps up to each bound, above the one before
  double step_seconds = 0;                                       ///< sum
  double last_step_unix_s = 0;
  int64_t evaluations = 0;
  double validation_loss = 0, validation_accuracy = 0;
  int64_t saves = 0, failed_saves = 0;
  int64_t durable_step = -1;
  double save_seconds = 0, stall_seconds = 0, total_stall_seconds = 0;
  int64_t progress_ns = 0;  ///< when something was last finished, by the steady clock
  int64_t patience_ns = 0;  ///< how long it may take until something else is
};

struct Health {
  bool is_good = true;
  std::string text;  ///< one line: why
};

/// The figures of a run, put down by the thread that trains and read by any other, at any time.
///
/// The writer stores a few dozen words a step and waits for nobody; a reader sees one moment, never half a step.
/// Threads: one writes, any number read; progress() from any number at once while nothing else is written.
class RunMeter {
 public:
  explicit RunMeter(const RunFacts& facts);
  ~RunMeter();
  RunMeter(const RunMeter&) = delete;
  RunMeter& operator=(const RunMeter&) = delete;

  void step(const StepFigures& figures);
  void skip_step();
  void evaluation(double loss, double accuracy);
  void save(const SaveFigures& figures);
  /// Part of something long is done, and the next part may take as long as RunFacts::patience, or `at_most` if longer.
  void progress(std::chrono::milliseconds at_most = {});

  RunFigures figures() const;
  std::string exposition() const;  ///< exposition_text() of now
  /// Good while steps, evaluations and saves get finished, each within RunFacts::patience or ten times the longest
  /// step, whichever is longer.
  Health health() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Prometheus' text format 0.0.4, a HELP and a TYPE line for each metric. What there is no value of yet is left out;
/// labels are two versions, and the histogram's bounds. Names are explained in README.md.
/// Source: https://prometheus.io/docs/instrumenting/exposition_formats/
std::string exposition_text(const RunFacts& facts, const RunFigures& figures);

Health health_of(const RunFigures& figures, int64_t now_ns);

}  // namespace lockstep::metrics
