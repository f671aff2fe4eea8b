#include "watch.h"

#include <cmath>

#include <lockstep/base/log.h>

namespace lockstep::train {

Watch::Watch(Fs& fs, const Options& options, const metrics::RunFacts& facts, uint64_t epoch)
    : ledger(fs, options.run_dir + "/ledger.jsonl", epoch),
      metrics(fs, options.run_dir + "/metrics.jsonl", facts.first_step, epoch),
      progress(options.steps, options.log_interval_steps),
      meter(facts),
      count_unit_(facts.count_unit) {}

void Watch::begin(const Options& options, int64_t step) {
  board_.emplace(options.run_dir, step);
  if (options.metrics_port > 0)
    endpoint_.emplace(metrics::EndpointOptions{.bind = options.metrics_bind, .port = options.metrics_port}, meter);
  if (!options.metrics_textfile.empty()) text_file_.emplace(options.metrics_textfile, meter);
}

void Watch::step(const metrics::StepFigures& figures) {
  const double rate = static_cast<double>(figures.count) / figures.seconds;
  metrics::Scalars scalars = {{"loss", figures.loss},
                              {"grad_norm", figures.grad_norm},
                              {"learning_rate", figures.learning_rate},
                              {count_unit_, static_cast<double>(figures.count)},
                              {"step_s", figures.seconds},
                              {count_unit_ + "_per_s", rate},
                              {"memory_bytes", static_cast<double>(figures.memory_bytes)}};
  if (!std::isnan(figures.accuracy)) scalars.emplace_back("accuracy", figures.accuracy);
  meter.step(figures);
  metrics.append(figures.step, scalars);
  for (auto& [name, value] : scalars) name.insert(0, "train/");
  board_->scalars(figures.step, scalars);
  progress.step(figures.step, figures.loss, figures.learning_rate, figures.grad_norm, rate, count_unit_);
}

void Watch::evaluation(int64_t step, double loss, double accuracy) {
  metrics::Scalars scalars = {{"validation/loss", loss}};
  std::string text = "validation loss " + std::to_string(loss);
  if (!std::isnan(accuracy)) {
    scalars.emplace_back("validation/accuracy", accuracy);
    text += ", accuracy " + std::to_string(accuracy);
  }
  meter.evaluation(loss, accuracy);
  board_->scalars(step, scalars);
  board_->flush();
  progress.message("step " + std::to_string(step) + "  " + text);
}

void Watch::save(const checkpoint::SaveResult& result) {
  const std::string name = "step " + std::to_string(result.step);
  meter.save({.step = result.step,
              .is_durable = result.durable,
              .seconds = result.seconds,
              .stall_seconds = result.stall_seconds});
  if (result.durable) {
    progress.message(name + "  checkpoint durable after " + std::to_string(result.seconds) +
                     " s, training held up for " + std::to_string(result.stall_seconds) + " s");
  } else {
    LOG(WARNING) << name << " could not be saved; training goes on, the checkpoints before it are untouched";
  }
}

}  // namespace lockstep::train
