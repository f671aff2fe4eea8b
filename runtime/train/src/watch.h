#pragma once

#include <cstdint>
#include <optional>

#include <lockstep/base/fs.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/metrics/endpoint.h>
#include <lockstep/metrics/run_log.h>
#include <lockstep/metrics/run_meter.h>
#include <lockstep/train/options.h>

namespace lockstep::train {

/// What rank 0 tells of a run while it goes on: to files, to a person, and to whoever asks its port.
struct Watch {
  Watch(Fs& fs, const Options& options, const metrics::RunFacts& facts, uint64_t epoch);

  void begin(const Options& options, int64_t step);  ///< once the run is ours: no other start is disturbed before

  void step(const metrics::StepFigures& figures);
  void evaluation(int64_t step, double loss, double accuracy);  ///< nan: no right answers counted
  void save(const checkpoint::SaveResult& result);              ///< but for the ledger's line

  metrics::Ledger ledger;
  metrics::MetricsFile metrics;
  metrics::ProgressLine progress;
  metrics::RunMeter meter;

 private:
  std::string count_unit_;
  std::optional<metrics::TensorBoardWriter> board_;
  std::optional<metrics::Endpoint> endpoint_;  // these two read the meter
  std::optional<metrics::TextFile> text_file_;
};

}  // namespace lockstep::train
