#include <algorithm>
#include <atomic>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>

#include <lockstep/metrics/run_meter.h>

#include "published.h"

namespace lockstep::metrics {
namespace {

using std::chrono::nanoseconds;

int64_t steady_ns() {
  return std::chrono::duration_cast<nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double unix_s() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

std::string number(int64_t value) { return std::to_string(value); }

std::string number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  char text[32];
  return {text, std::to_chars(std::begin(text), std::end(text), value).ptr};
}

std::string seconds_text(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", static_cast<double>(ns) * 1e-9);
  return text;
}

std::string quoted(const std::string& value) {
  std::string text = "\"";
  for (const char c : value) {
    if (c == '\\' || c == '"') text += '\\';
    text += c == '\n' ? std::string("\\n") : std::string(1, c);
  }
  return text + '"';
}

std::string as_name(std::string unit) {
  for (char& c : unit) {
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  }
  return unit;
}

class Exposition {
 public:
  template <typename Number>
  void gauge(const std::string& name, const char* help, Number value) {
    family(name, "gauge", help);
    sample(name, "", number(value));
  }
  template <typename Number>
  void counter(const std::string& name, const char* help, Number value) {
    family(name, "counter", help);
    sample(name, "", number(value));
  }
  void family(const std::string& name, const char* type, const char* help) {
    text_ += "# HELP lockstep_" + name + " " + help + "\n# TYPE lockstep_" + name + " " + type + "\n";
  }
  void sample(const std::string& name, const std::string& labels, const std::string& value) {
    text_ += "lockstep_" + name + (labels.empty() ? "" : "{" + labels + "}") + " " + value + "\n";
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

void add_run(Exposition& out, const RunFacts& facts, const RunFigures& now) {
  out.family("build_info", "gauge", "Versions; the value is always 1.");
  out.sample("build_info", "version=" + quoted(LOCKSTEP_VERSION) + ",libtorch=" + quoted(facts.libtorch), "1");
  out.gauge("world_size", "Ranks of the job.", int64_t{facts.world_size});
  out.gauge("incarnation", "Which start of the run this is.", static_cast<int64_t>(facts.incarnation));
  out.gauge("planned_steps", "Optimizer steps that the run is to have when it ends.", facts.planned_steps);
  out.gauge("step", "Optimizer steps finished, those of earlier starts included.", now.last.step);
  out.counter("steps_total", "Optimizer steps finished by this start.", now.steps);
  out.counter("skipped_steps_total", "Steps left out because loss or gradient was not finite.", now.skipped_steps);
}

void add_step(Exposition& out, const RunFacts& facts, const RunFigures& now) {
  const StepFigures& last = now.last;
  const double seconds = last.seconds;
  out.gauge("last_step_timestamp_seconds", "When the last step was finished, seconds since 1970.",
            now.last_step_unix_s);
  out.gauge("loss", "Training loss of the last step, per counted unit.", last.loss);
  if (!std::isnan(last.accuracy)) out.gauge("accuracy_ratio", "Right answers in the last step.", last.accuracy);
  out.gauge("grad_norm", "Norm of the last step's gradient, before clipping.", last.grad_norm);
  out.gauge("learning_rate", "Learning rate of the last step.", last.learning_rate);
  out.counter("trained_samples_total", "Samples trained on by this start, over all ranks.",
              now.steps * facts.samples_per_step);
  out.gauge("trained_samples_per_second", "Speed of the last step.",
            static_cast<double>(facts.samples_per_step) / seconds);
  if (const std::string unit = as_name(facts.count_unit); unit != "samples") {
    out.counter("trained_" + unit + "_total", "What the task counts, trained on by this start, over all ranks.",
                now.counted);
    out.gauge("trained_" + unit + "_per_second", "Speed of the last step.", static_cast<double>(last.count) / seconds);
  }
  out.gauge("memory_bytes", "Resident memory of rank 0.", last.memory_bytes);
  if (last.straggler_rank < 0) return;
  out.gauge("straggler_ratio", "Longest compute time of a rank in the last 20 steps over that of the median rank.",
            last.straggler_ratio);
  out.gauge("straggler_rank", "The rank that computed longest.", last.straggler_rank);
}

void add_step_seconds(Exposition& out, const RunFigures& now) {
  out.family("step_seconds", "histogram", "Time a step takes, from its batch to its update.");
  int64_t steps = 0;
  for (size_t i = 0; i < now.step_histogram.size(); ++i) {
    steps += now.step_histogram[i];
    const double bound = i < kStepBounds.size() ? kStepBounds[i] : std::numeric_limits<double>::infinity();
    out.sample("step_seconds_bucket", "le=" + quoted(number(bound)), number(steps));
  }
  out.sample("step_seconds_sum", "", number(now.step_seconds));
  out.sample("step_seconds_count", "", number(steps));
}

void add_evaluation(Exposition& out, const RunFigures& now) {
  out.counter("evaluations_total", "Evaluations finished by this start.", now.evaluations);
  if (now.evaluations == 0) return;
  out.gauge("validation_loss", "Loss of the last evaluation, per counted unit.", now.validation_loss);
  if (!std::isnan(now.validation_accuracy))
    out.gauge("validation_accuracy_ratio", "Right answers in the last evaluation.", now.validation_accuracy);
}

void add_checkpoints(Exposition& out, const RunFigures& now) {
  if (now.durable_step >= 0)
    out.gauge("checkpoint_durable_step", "Step of the newest durable checkpoint.", now.durable_step);
  out.counter("checkpoint_saves_total", "Checkpoints of this start that are durable.", now.saves);
  out.counter("checkpoint_failed_saves_total", "Checkpoints of this start that could not be saved.", now.failed_saves);
  out.counter("checkpoint_stall_seconds_total", "Time for which saves have held training up.", now.total_stall_seconds);
  if (now.saves == 0) return;
  out.gauge("checkpoint_last_save_seconds", "Time the last save took until it was durable.", now.save_seconds);
  out.gauge("checkpoint_last_stall_seconds", "Time for which the last save held training up.", now.stall_seconds);
}

}  // namespace

std::string exposition_text(const RunFacts& facts, const RunFigures& figures) {
  Exposition out;
  add_run(out, facts, figures);
  if (figures.steps > 0) add_step(out, facts, figures);
  add_step_seconds(out, figures);
  add_evaluation(out, figures);
  add_checkpoints(out, figures);
  return out.take();
}

Health health_of(const RunFigures& figures, int64_t now_ns) {
  const int64_t silence_ns = std::max<int64_t>(now_ns - figures.progress_ns, 0);
  const std::string step = "step " + std::to_string(figures.last.step);
  if (silence_ns <= figures.patience_ns) return {true, "ok: " + step + ", alive " + seconds_text(silence_ns) + " ago"};
  return {false, "nothing finished for " + seconds_text(silence_ns) + ", and " + seconds_text(figures.patience_ns) +
                     " is the limit; the last was " + step};
}

class RunMeter::Impl {
 public:
  explicit Impl(const RunFacts& facts) : facts_(facts) {
    now_.last.step = facts.first_step;
    now_.durable_step = facts.durable_step;
    publish();
  }

  const RunFacts& facts() const { return facts_; }
  RunFigures& next() { return now_; }
  void publish() {
    published_.store(now_);
    progress({});
  }
  void progress(nanoseconds at_most) {
    const nanoseconds steps(static_cast<int64_t>(10e9 * longest_step_s_));
    patience_ns_.store(std::max({nanoseconds(facts_.patience), at_most, steps}).count(), std::memory_order_relaxed);
    progress_ns_.store(steady_ns(), std::memory_order_relaxed);
  }
  void step_took(double seconds) { longest_step_s_ = std::max(longest_step_s_, seconds); }

  RunFigures load() const {
    RunFigures figures = published_.load();
    figures.patience_ns = patience_ns_.load(std::memory_order_relaxed);
    figures.progress_ns = progress_ns_.load(std::memory_order_relaxed);
    return figures;
  }

 private:
  RunFacts facts_;
  RunFigures now_;  // the writer's own
  double longest_step_s_ = 0;
  Published<RunFigures> published_;
  std::atomic<int64_t> patience_ns_{0}, progress_ns_{0};
};

RunMeter::RunMeter(const RunFacts& facts) : impl_(std::make_unique<Impl>(facts)) {}
RunMeter::~RunMeter() = default;

void RunMeter::step(const StepFigures& figures) {
  RunFigures& next = impl_->next();
  next.last = figures;
  ++next.steps;
  next.counted += figures.count;
  next.step_seconds += figures.seconds;
  ++next.step_histogram[static_cast<size_t>(std::lower_bound(kStepBounds.begin(), kStepBounds.end(), figures.seconds) -
                                            kStepBounds.begin())];
  next.last_step_unix_s = unix_s();
  impl_->step_took(figures.seconds);
  impl_->publish();
}

void RunMeter::skip_step() {
  ++impl_->next().skipped_steps;
  ++impl_->next().last.step;
  impl_->publish();
}

void RunMeter::evaluation(double loss, double accuracy) {
  RunFigures& next = impl_->next();
  ++next.evaluations;
  next.validation_loss = loss;
  next.validation_accuracy = accuracy;
  impl_->publish();
}

void RunMeter::save(const SaveFigures& figures) {
  RunFigures& next = impl_->next();
  if (figures.is_durable) {
    ++next.saves;
    next.durable_step = figures.step;
    next.save_seconds = figures.seconds;
    next.stall_seconds = figures.stall_seconds;
    next.total_stall_seconds += figures.stall_seconds;
  } else {
    ++next.failed_saves;
  }
  impl_->publish();
}

void RunMeter::progress(std::chrono::milliseconds at_most) { impl_->progress(at_most); }

RunFigures RunMeter::figures() const { return impl_->load(); }
std::string RunMeter::exposition() const { return exposition_text(impl_->facts(), figures()); }
Health RunMeter::health() const { return health_of(figures(), steady_ns()); }

}  // namespace lockstep::metrics
