#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep::metrics {

/// The figures of one step, as one line of metrics.jsonl and as TensorBoard scalars. Order is kept; names are
/// snake_case with units and are written as they are.
using Scalars = std::vector<std::pair<std::string, double>>;

/// metrics.jsonl: one JSON object a line and step, e.g. {"step":120,"loss":2.1034,...}.
///
/// Numbers have the digits that give a reader the same bits back; inf and nan, which JSON lacks, become null. Lines
/// collect in memory and are written a few kilobytes at a time: what a crash loses belongs to steps that run again.
/// A disk that is full costs one WARNING, not the run: lines wait in memory until there is room again.
/// A file of this start's own, which takes the place of the one before with publish(): what an older start still
/// writes, after SIGSTOP and SIGCONT, goes nowhere.
class MetricsFile {
 public:
  /// @param resume_step steps finished so far. Lines of later steps, of an older start, are left out, so each step
  ///        stands once. <= 0: the file starts anew.
  /// @param epoch of this start (base/replacement.h).
  /// @throws IoError when the file cannot be made.
  MetricsFile(Fs& fs, const std::string& path, int64_t resume_step, uint64_t epoch);
  void publish();  ///< once it is sure that this start owns the run. @throws IoError
  void append(int64_t step, const Scalars& scalars);
  void flush();
  ~MetricsFile();  ///< flushes
  MetricsFile(const MetricsFile&) = delete;
  MetricsFile& operator=(const MetricsFile&) = delete;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// TensorBoard event file events.out.tfevents.<unix s>.<host>.<pid>.<number> in `directory`: a new one each start.
///
/// Each begins with a session-log START at `resume_step` + 1: readers then drop the points of older files at that step
/// and later. A disk that fills up costs the curves and one WARNING, not the run.
/// Source: TensorFlow, core/lib/io/record_writer.h and core/util/event.proto.
class TensorBoardWriter {
 public:
  /// @throws IoError when the file cannot be made.
  TensorBoardWriter(const std::string& directory, int64_t resume_step);
  void scalars(int64_t step, const Scalars& scalars);  ///< tags as given, e.g. "train/loss"; stored as f32
  void flush();
  ~TensorBoardWriter();
  TensorBoardWriter(const TensorBoardWriter&) = delete;
  TensorBoardWriter& operator=(const TensorBoardWriter&) = delete;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// ledger.jsonl: what happened to the run, one JSON line an event, fsynced before append() returns.
///
/// Each line carries the XXH3-128 of the line before ("previous", 32 hex digits; "start" in the first), so a line that
/// was changed, taken out or put in shows. It guards against accidents and edits, not against a forger.
class Ledger {
 public:
  /// Goes on with the events of the file at `path`, in a file of this start's own, as MetricsFile. A torn last line, of
  /// a crash, is left out.
  /// @throws CorruptData when the chain of an existing file is broken. @throws IoError.
  Ledger(Fs& fs, const std::string& path, uint64_t epoch);
  void publish();
  /// `fields_json`: a JSON object merged into the line. Events: start, resume, durable, skipped, preempted,
  /// replica_fault, hang (of the start before), end.
  /// @throws IoError. The next call writes the event too, so a disk that was full for a while costs none.
  void append(const std::string& event, const std::string& fields_json);
  ~Ledger();
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// The events of a ledger, a JSON object each; none where there is no file yet. @throws as verify_ledger().
std::vector<std::string> read_ledger(Fs& fs, const std::string& path);
/// Reads a ledger without changing it. A torn last line is no fault.
/// @return its number of events. @throws CorruptData naming the first line that does not follow the one before.
int64_t verify_ledger(Fs& fs, const std::string& path);

/// Progress for a person, on stderr: one rewritten line on a terminal, a plain line every log interval elsewhere. No
/// colours, so NO_COLOR has nothing to switch off.
class ProgressLine {
 public:
  ProgressLine(int64_t total_steps,
               int64_t log_interval_steps);  ///< a terminal: isatty(stderr), or lockstep run says so
  /// e.g. "step 120/1500  loss 2.1034  lr 3.00e-04  grad norm 0.840  41.2k tokens/s  eta 2:13"
  void step(int64_t step, double loss, double learning_rate, double grad_norm, double rate,
            const std::string& rate_unit);
  void message(const std::string& text);  ///< a line of its own that does not tear the bar
  void finish();
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::metrics
