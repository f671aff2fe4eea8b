#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep::metrics {

/// The figures of one step, as one line of metrics.jsonl and as TensorBoard scalars. Order is kept; names are snake_case with units.
using Scalars = std::vector<std::pair<std::string, double>>;

/// metrics.jsonl: one line a step; on resume at step s, lines of steps >= s are cut off first, so each step stands once.
class MetricsFile {
 public:
  MetricsFile(Fs& fs, const std::string& path, int64_t resume_step);
  void append(int64_t step, const Scalars& scalars);
  void flush();
  ~MetricsFile();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// TensorBoard event file: a new file each start; on resume writes a session-log START so that readers drop the points after it.
class TensorBoardWriter {
 public:
  TensorBoardWriter(const std::string& directory, int64_t resume_step);
  void scalars(int64_t step, const Scalars& scalars);  ///< tags as given, e.g. "train/loss"
  void flush();
  ~TensorBoardWriter();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// ledger.jsonl: what happened to the run, one JSON line an event, each carrying the hash of the line before, fsynced.
class Ledger {
 public:
  Ledger(Fs& fs, const std::string& path);  ///< @throws CorruptData when the chain of an existing file is broken
  /// `fields_json`: a JSON object merged into the line. Events: start, resume, durable, skipped, preempted, end.
  void append(const std::string& event, const std::string& fields_json);
  ~Ledger();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Progress for a person: one rewritten line on a terminal, a plain line every log interval elsewhere (NO_COLOR respected).
class ProgressLine {
 public:
  ProgressLine(int64_t total_steps, int64_t log_interval_steps);  ///< decides by isatty(stderr)
  /// e.g. "step 120/1500  loss 2.1034  lr 3.0e-04  grad norm 0.84  41.2k tokens/s  eta 2:13"
  void step(int64_t step, double loss, double learning_rate, double grad_norm, double rate, const std::string& rate_unit);
  void message(const std::string& text);  ///< a line of its own that does not tear the bar
  void finish();
  ~ProgressLine();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::metrics
