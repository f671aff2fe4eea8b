#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>

#include <unistd.h>

#include <nlohmann/json.hpp>
#include <torch/nn/module.h>
#include <torch/types.h>
#include <torch/version.h>

#include <lockstep/base/error.h>
#include <lockstep/base/launch_records.h>
#include <lockstep/base/log.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/base/replacement.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/collectives/arithmetic.h>
#include <lockstep/data/loader.h>
#include <lockstep/nn/cpu_allocator.h>
#include <lockstep/train/trainer.h>

#include "heartbeat.h"
#include "lanes.h"
#include "memory.h"
#include "parallel_model.h"
#include "phase_scope.h"
#include "profile.h"
#include "replica_watch.h"
#include "run_directory.h"
#include "save_interval.h"
#include "step_exchange.h"
#include "watch.h"
#include "whole_model.h"

namespace lockstep::train {
namespace {

constexpr int kMaxSkippedInARow = 3;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr uint64_t kTimedSteps = 20;  // in a ring's sums of times

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Ticks cancel out, so ranks of machines with other clocks compare.
double busy_share(flight::Ring* ring) {
  if (ring == nullptr || ring->header().timed_steps.load(std::memory_order_relaxed) < kTimedSteps) return 0;
  const auto wall = static_cast<double>(ring->header().wall.load(std::memory_order_relaxed));
  return static_cast<double>(ring->header().compute.load(std::memory_order_relaxed)) / wall;
}

class Trainer {
 public:
  Trainer(ProcessGroup& world, at::Device device, Task& task, const Options& options, Fs& fs)
      : options_(resolve(options, world.size())),
        world_(world),
        device_(device),
        task_(task),
        fs_(fs),
        mesh_(world, options_.mesh),
        lanes_(num_lanes(), [threads = options_.threads_per_rank] { configure_arithmetic(threads); }),
        profile_(world, device, fs, options_.run_dir + "/traces", parse_steps(options_.profile_steps),
                 options_.runtime.collective_timeout),
        track_(profile_.track("step")),
        model_(mesh_, device, task, options_, lanes_, &profile_.trace()),
        save_interval_(options_.checkpoint_interval_steps, options_.mean_time_between_failures_h * 3600) {
    build_data();
    open_run();
  }

  Result run();

 private:
  // Set-up, in this order: what can fail for a person's reasons comes before anything is written.
  int num_lanes();
  void build_data();
  void open_run();
  void compare_arithmetic();
  void take_run();
  void watch_replicas();
  void resume(const std::string& began_with);
  void check_progress(const checkpoint::Progress& progress);

  // The step, top to bottom.
  void step();
  void skip_step(const StepReport& report, double loss);
  void check_replicas(int64_t bucket, std::span<const uint64_t> digests);
  void check_all_replicas();
  int64_t prefetch();

  void evaluate();
  // Checkpoints: begun here, written while training goes on, and waited for at the end.
  void start_save();
  void save();
  void advance_save();
  void finish_save();
  void save_at_last();
  std::string record_json() const;
  checkpoint::Progress progress() const;
  void report_save(const checkpoint::SaveResult& result);
  void note(const std::string& event, const nlohmann::ordered_json& fields);
  void stop_if_asked(bool asked);
  void sign_off();
  void show_result();
  bool is_chief() const { return world_.rank() == 0; }

  Options options_;
  ProcessGroup& world_;
  at::Device device_;
  Task& task_;
  Fs& fs_;
  Mesh mesh_;
  LanePool lanes_;

  Profile profile_;
  metrics::TraceTrack track_;
  ParallelModel model_;
  std::shared_ptr<const data::Dataset> training_, validation_;
  std::unique_ptr<data::TrainingLoader> loader_;
  SaveInterval save_interval_;
  std::unique_ptr<checkpoint::Store> store_;
  std::unique_ptr<Watch> watch_;
  std::optional<ReplicaWatch> replicas_;  // where something has a replica
  std::unique_ptr<Heartbeat> heartbeat_;
  std::string config_;
  std::string resumed_path_;          // by --resume=PATH
  std::string changed_;               // since the checkpoint that was resumed: configuration and machine
  std::string different_arithmetic_;  // of ranks of this start
  uint64_t epoch_ = 0;                // fencing: of this start

  std::vector<data::Batch> batches_, next_batches_;
  int64_t step_ = 0;        // updates finished
  int64_t step_count_ = 0;  // what the coming step counts for, over all ranks
  int64_t saved_step_ = -1;
  bool save_is_due_ = false;  // by rank 0's clock
  int skipped_in_a_row_ = 0;
  Result result_{.validation_loss = kNan, .validation_accuracy = kNan};
};

int Trainer::num_lanes() {
  nn::install_cpu_allocator();
  const MeshShape& mesh = options_.mesh;
  if (!device_.is_cpu()) {
    if (mesh.pipeline * mesh.context * mesh.tensor * mesh.expert > 1 || options_.recompute != Recompute::kNone)
      throw ConfigError(
          "on GPUs ranks are data-parallel so far, with any --zero_stage and --recompute=none. Mend: --device=cpu");
    return 1;  // a stream is what fills a GPU
  }
  if (options_.zero_stage >= 2 || mesh.pipeline * mesh.context * mesh.tensor * mesh.expert > 1)
    return 1;  // their collectives need one order
  const int64_t share = leaf_share(options_.num_leaves(), mesh_.data().rank(), mesh_.data().size()).count();
  const int wanted = options_.parallel_micro_batches > 0 ? options_.parallel_micro_batches
                                                         : spare_lanes(world_, options_.threads_per_rank);
  return static_cast<int>(std::min<int64_t>(wanted, share));
}

void Trainer::build_data() {
  training_ = task_.training_data();
  validation_ = task_.validation_data();
  LOCKSTEP_CHECK(training_ != nullptr) << "task " << task_.name() << " has no training data";
  if (training_->size() < options_.global_batch_size) {
    throw ConfigError("the training data holds " + std::to_string(training_->size()) +
                      " samples, fewer than one --global_batch_size=" + std::to_string(options_.global_batch_size) +
                      ". Mend: more data, shorter samples or a smaller batch");
  }
}

void Trainer::open_run() {
  config_ = config_json(options_, task_.config_json());
  if (flight::Ring* ring = world_.flight_ring()) ring->set_folder(std::filesystem::absolute(options_.run_dir));
  prepare_run_directory(fs_, world_, options_.run_dir, options_.share == "group" ? Share::kGroup : Share::kNone);
  if (is_chief() || std::string_view(world_.backend()) != "local")  // ranks that are threads share one log
    start_logging("lockstep", world_.rank(), world_.size(), options_.run_dir + "/logs");
  compare_arithmetic();
  epoch_ = checkpoint::acquire_epoch(
      fs_, world_, options_.run_dir,
      format::Starter{.take_over = options_.take_over, .job_id = options_.job_id, .job_start = options_.job_start});
  if (is_chief()) heartbeat_ = std::make_unique<Heartbeat>(fs_, options_.run_dir, epoch_);
  const RunHistory history = is_chief() ? read_history(fs_, options_.run_dir) : RunHistory();
  store_ = std::make_unique<checkpoint::Store>(fs_, world_,
                                               checkpoint::Options{.run_dir = options_.run_dir,
                                                                   .keep_last = options_.keep_checkpoints,
                                                                   .keep_every_steps = options_.keep_every_steps,
                                                                   .epoch = epoch_,
                                                                   .timeout = options_.save_timeout,
                                                                   .check_plan = options_.check_collectives,
                                                                   .read_threads = std::min(8, spare_lanes(world_, 1)),
                                                                   .sha256 = options_.checkpoint_sha256,
                                                                   .known_durable = history.durable,
                                                                   .first_epoch = history.first_epoch,
                                                                   .trust_foreign = options_.trust_foreign_checkpoint});
  resume(all_gather_text(world_, history.from)[0]);
  if (options_.asynchronous_save && save_interval_.saves_between()) store_->reserve(model_.state());
  watch_replicas();
  loader_ = std::make_unique<data::TrainingLoader>(training_,
                                                   data::LoaderOptions{.seed = options_.seed,
                                                                       .micro_batch_size = options_.micro_batch_size,
                                                                       .num_leaves = options_.num_leaves(),
                                                                       .leaves = model_.leaves(),
                                                                       .first_step = step_,
                                                                       .pin_memory = device_.is_cuda()});
  take_run();
}

void Trainer::compare_arithmetic() {
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  const auto facts = all_gather_text(world_, arithmetic_facts(options_.threads_per_rank));
  different_arithmetic_ = arithmetic_differences(all_gather_text(world_, host.data()), facts);
  if (!different_arithmetic_.empty() && is_chief()) {
    LOG(WARNING)
        << "not all ranks compute alike:" << different_arithmetic_
        << "\nSo bits depend on which rank computes what: another layout, or a restart on other hosts, ends with "
           "other weights than this one. Mend: hosts of one kind, or, at some speed, ATEN_CPU_CAPABILITY=avx2 "
           "MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 in the environment of every rank";
  }
}

// Loading takes long, so another start may own the run by now. Whoever does puts its files in place of those before,
// all written by then: nothing of two starts comes between.
void Trainer::take_run() {
  if (!is_chief()) return store_->as_owner([] {});
  nlohmann::ordered_json record = {{"task", task_.name()},
                                   {"step", step_},
                                   {"epoch", epoch_},
                                   {"config", nlohmann::ordered_json::parse(config_)},
                                   {"mesh", mesh_.describe()},
                                   {"world_size", world_.size()},
                                   {"backend", world_.backend()},
                                   {"parallel_micro_batches", lanes_.size()},
                                   {"torch", TORCH_VERSION},
                                   {"arithmetic", arithmetic_record(options_.threads_per_rank)},
                                   {"training_data", training_->fingerprint()}};
  if (!resumed_path_.empty()) record["from"] = resumed_path_;
  if (!changed_.empty()) record["changed"] = changed_;
  if (!different_arithmetic_.empty()) record["different_arithmetic"] = different_arithmetic_;
  Replacement run_record(fs_, options_.run_dir + "/run.json", epoch_, record.dump(2) + "\n");
  watch_ = std::make_unique<Watch>(fs_, options_,
                                   metrics::RunFacts{.count_unit = task_.count_unit(),
                                                     .libtorch = TORCH_VERSION,
                                                     .planned_steps = options_.steps,
                                                     .samples_per_step = options_.global_batch_size,
                                                     .world_size = world_.size(),
                                                     .incarnation = epoch_,
                                                     .first_step = step_,
                                                     .durable_step = saved_step_,
                                                     .patience = options_.runtime.collective_timeout},
                                   epoch_);
  for (const std::string& hang : new_hangs(fs_, options_.run_dir)) watch_->ledger.append("hang", hang);
  watch_->ledger.append(result_.resumed_from < 0 ? "start" : "resume", record.dump());
  store_->as_owner([&] {
    watch_->ledger.publish();
    watch_->metrics.publish();
    run_record.publish();
  });
  watch_->begin(options_, step_);
  LOG(INFO) << task_.name() << ": " << model_.num_parameters() << " parameters, " << mesh_.describe() << ", "
            << options_.num_leaves() << " micro-batches of " << options_.micro_batch_size << " a step, "
            << lanes_.size() << " at once on this rank, " << options_.precision << ", run directory "
            << options_.run_dir;
}

void Trainer::watch_replicas() {
  if (options_.replica_check_interval_steps == 0 || options_.reduction != "ordered") return;
  replicas_.emplace(model_.state(), world_.rank(), options_.replica_check_interval_steps);
  if (replicas_->num_digests() == 0) replicas_.reset();
}

// @param began_with  the checkpoint that this run was last started from by its path, if it was.
void Trainer::resume(const std::string& began_with) {
  std::optional<checkpoint::Progress> progress;
  if (options_.resume == "auto") {
    progress = store_->load_newest(model_.state());
    if (!progress && !began_with.empty()) {
      throw ConfigError("this run was last started with --resume=" + began_with +
                        " and has saved nothing since. Mend: start it so again, or over with --resume=never");
    }
  } else if (options_.resume != "never") {
    progress = store_->load(options_.resume, model_.state());
    resumed_path_ = options_.resume;
  }
  if (!progress) {
    model_.initialize(options_.seed);
    if (!options_.init_from.empty()) store_->load(options_.init_from, model_.state(), /*weights_only=*/true);
    model_.loaded();
    return;
  }
  check_progress(*progress);
  model_.loaded();
  step_ = result_.resumed_from = progress->step;
  if (resumed_path_.empty()) saved_step_ = step_;  // else it lies elsewhere, or was passed by
}

void Trainer::check_progress(const checkpoint::Progress& progress) {
  const std::string difference = config_difference(progress.config_json, config_, options_.accept_config_change);
  if (!difference.empty()) {
    throw ConfigError(
        "this run was started with another configuration:" + difference +
        "\nMend: use the old values, or accept a change with --accept_config_change=KEY,… , or name another --run_dir");
  }
  if (progress.data_fingerprint != training_->fingerprint()) {
    throw ConfigError("the training data is not what step " + std::to_string(progress.step) + " was trained on (" +
                      progress.data_fingerprint + " then, " + training_->fingerprint() +
                      " now). Mend: restore --train_data, or name another --run_dir");
  }
  changed_ = config_difference(progress.config_json, config_, {});
  const std::string record = config_difference(progress.record_json, record_json(), {"mesh"});
  if (!record.empty() && is_chief())
    LOG(WARNING) << "this machine computes otherwise than the one that saved step " << progress.step
                 << ", so bits may differ from here on:" << record;
  changed_ += record;
}

Result Trainer::run() {
  result_.steps = step_;
  if (step_ >= options_.steps) {
    if (is_chief())
      LOG(INFO) << "this run is done: " << step_ << " of " << options_.steps << " steps, in " << options_.run_dir;
    save_at_last();  // one that came from elsewhere
    return result_;
  }
  if (step_ == 0 && options_.checkpoint_initial) save();
  const auto start = Clock::now();
  StepReport first;
  first.count = prefetch();
  step_count_ = exchange(world_, first).count;
  const PhaseScope training(world_, flight::Phase::kTraining);
  while (step_ < options_.steps) {
    profile_.begin_step(step_);
    note_step(step_ + 1);
    if (flight::Ring* ring = world_.flight_ring()) ring->set_step(step_ + 1);
    step();
    const bool last = step_ == options_.steps;
    if (last) save();
    if (!last && (save_is_due_ || save_interval_.is_due_after(step_))) start_save();
    if (last || (options_.eval_interval_steps > 0 && step_ % options_.eval_interval_steps == 0)) evaluate();
    profile_.end_step(step_, last);
  }
  save_at_last();
  result_.steps = step_;
  result_.train_seconds = seconds_since(start);
  const std::string memory = peak_memory_json(world_);
  if (is_chief()) {
    watch_->progress.finish();
    note("end", {{"step", step_},
                 {"loss", result_.loss},
                 {"train_s", result_.train_seconds},
                 {"peak_bytes", nlohmann::ordered_json::parse(memory)}});
    LOG(INFO) << "done: " << step_ << " steps in " << result_.train_seconds << " s, loss " << result_.loss
              << (validation_ ? ", validation loss " + std::to_string(result_.validation_loss) : "");
    sign_off();
    show_result();
  }
  return result_;
}

// The whole model, on rank 0: as it is here, or out of the last checkpoint where it is cut over ranks.
void Trainer::show_result() {
  if (!task_.wants_finished_model()) return;
  std::shared_ptr<torch::nn::Module> model = model_.whole();
  if (!model) model = load_whole_model(fs_, task_, options_.run_dir);
  model->eval();
  task_.finished(*model);
}

void Trainer::step() {
  const auto start = Clock::now();
  const metrics::TraceSpan span(track_, "step", "step", {"step", step_ + 1});
  batches_ = std::move(next_batches_);
  StepReport report = model_.compute(step_, step_count_, batches_);
  report.stop = stop_requested();
  report.writing = store_->is_writing();
  report.busy = busy_share(world_.flight_ring());
  report.save = is_chief() && !store_->is_saving() && save_interval_.is_due_by_clock();
  const double divisor = static_cast<double>(step_count_);
  report.count = prefetch();
  const double local_squares = is_planted(Plant::kClipOfLocalNorm) ? report.squares.value() : 0;
  const int64_t bucket = replicas_ ? replicas_->bucket_of(step_) : 0;
  std::vector<uint64_t> digests;
  std::vector<double> busy;
  if (replicas_) {
    const metrics::TraceSpan hash_span(track_, "replica digest", "step");
    digests = replicas_->digests(bucket);
  }
  {
    const metrics::TraceSpan exchange_span(track_, "exchange", "step");
    report = exchange(world_, report, &digests, is_chief() ? &busy : nullptr);
  }
  if (replicas_) check_replicas(bucket, digests);

  const double loss = report.loss.value() / divisor;
  if (report.squares.has_non_finite() || report.loss.has_non_finite()) {
    skip_step(report, loss);
  } else {
    skipped_in_a_row_ = 0;
    const double grad_norm = std::sqrt(report.squares.value());
    const double learning_rate = optim::learning_rate_at(options_.schedule, step_);
    model_.update({.learning_rate = learning_rate,
                   .grad_scale = optim::clip_coefficient(
                       is_planted(Plant::kClipOfLocalNorm) ? std::sqrt(local_squares) : grad_norm, options_.clip_norm),
                   .step = step_ + 1});
    ++step_;
    result_.loss = loss;
    if (is_chief()) {
      const auto slowest = slowest_rank(busy);
      watch_->step({.step = step_,
                    .loss = loss,
                    .grad_norm = grad_norm,
                    .learning_rate = learning_rate,
                    .accuracy = report.has_correct ? report.correct.value() / divisor : kNan,
                    .count = step_count_,
                    .seconds = seconds_since(start),
                    .memory_bytes = resident_bytes(),
                    .straggler_rank = slowest ? slowest->rank : -1,
                    .straggler_ratio = slowest ? slowest->ratio : kNan});
    }
  }
  step_count_ = report.count;
  save_is_due_ = report.save != 0;
  if (store_->is_saving() && !report.writing) advance_save();
  stop_if_asked(report.stop != 0);
}

// Every rank has the same digests, so all find the same fault; the ledger has it before the first of them goes.
void Trainer::check_replicas(int64_t bucket, std::span<const uint64_t> digests) {
  const auto fault = replicas_->find_fault(bucket, digests);
  if (!fault) return;
  const auto [message, record] = replicas_->explain(*fault, step_, world_);
  if (is_chief()) {
    watch_->progress.finish();
    watch_->metrics.flush();
    note("replica_fault", nlohmann::ordered_json::parse(record));
  }
  world_.barrier(options_.runtime.collective_timeout);
  throw NodeFault(message);
}

// A number that is not finite may come from one bad bit: everything is looked at, in an exchange of its own.
void Trainer::check_all_replicas() {
  if (!replicas_) return;
  for (int64_t bucket = 0; bucket < replicas_->interval_steps(); ++bucket) {
    const std::vector<uint64_t> mine = replicas_->digests(bucket);
    const std::string all = all_gather_bytes(world_, std::as_bytes(std::span(mine)));
    std::vector<uint64_t> digests(all.size() / sizeof(uint64_t));
    std::memcpy(digests.data(), all.data(), all.size());
    check_replicas(bucket, digests);
  }
}

// Every rank sees the same flag, so every rank skips. The data moves on; the update does not.
void Trainer::skip_step(const StepReport& report, double loss) {
  model_.drop_gradients();
  check_all_replicas();
  if (++skipped_in_a_row_ > kMaxSkippedInARow) {
    std::string culprit = report.squares.has_non_finite() ? model_.name_of_non_finite_gradient() : "";
    if (!report.squares.has_non_finite()) {
      culprit = "the loss";
    } else {
      culprit.insert(0, culprit.empty() ? "a gradient of another rank" : "the gradient of ");
    }
    throw ConfigError(culprit + " was not finite in " + std::to_string(skipped_in_a_row_) + " steps running, at step " +
                      std::to_string(step_) + " (loss " + std::to_string(loss) +
                      "). Mend: lower --learning_rate, or look at the data of this step");
  }
  if (is_chief()) {
    LOG(WARNING) << "step " << step_ << " skipped: loss or gradient is not finite (loss " << loss << ")";
    note("skipped", {{"step", step_}});
  }
  ++step_;
  if (is_chief()) watch_->meter.skip_step();
}

int64_t Trainer::prefetch() {
  const metrics::TraceSpan span(track_, "data", "step");
  int64_t count = 0;
  if (step_ + 1 < options_.steps || next_batches_.empty()) {
    next_batches_ = loader_->next();
    for (const auto& batch : next_batches_) count += model_.counts_batches() ? task_.count(batch) : 0;
  }
  return count;
}

void Trainer::evaluate() {
  if (!validation_) return;
  const PhaseScope phase(world_, flight::Phase::kEvaluating);
  const metrics::TraceSpan span(track_, "evaluate", "step");
  const data::EvaluationPass pass(validation_, options_.micro_batch_size, options_.eval_samples);
  const StepReport report = exchange(world_, model_.evaluate(pass.num_micro_batches(), [&](int64_t number) {
    if (is_chief()) watch_->meter.progress();  // from any lane
    return pass.get(number);
  }));
  const double count = static_cast<double>(report.count);
  result_.validation_loss = report.loss.value() / count;
  if (report.has_correct) result_.validation_accuracy = report.correct.value() / count;
  if (is_chief()) watch_->evaluation(step_, result_.validation_loss, result_.validation_accuracy);
}

// What computes: the bits depend on it, beside the configuration; of the mesh, by tier A, they do not.
std::string Trainer::record_json() const {
  nlohmann::ordered_json record{{"mesh", mesh_.describe()},
                                {"torch", TORCH_VERSION},
                                {"arithmetic", arithmetic_record(options_.threads_per_rank)}};
  if (!device_.is_cpu()) record["device"] = at::DeviceTypeName(device_.type(), /*lower_case=*/true);
  return record.dump();
}

checkpoint::Progress Trainer::progress() const {
  return {.step = step_,
          .samples = step_ * options_.global_batch_size,
          .config_json = config_,
          .record_json = record_json(),
          .data_fingerprint = training_->fingerprint()};
}

// One at a time: where storage is slower than the interval, training waits for it.
void Trainer::start_save() {
  if (!options_.asynchronous_save) return save();
  const PhaseScope phase(world_, flight::Phase::kSaving);
  const metrics::TraceSpan span(track_, "checkpoint", "step");
  finish_save();
  // First: the steps of a checkpoint do not run again, so their lines must not get lost after it.
  if (is_chief()) watch_->metrics.flush();
  if (!store_->start_save(progress(), model_.state())) report_save({.step = step_});
}

void Trainer::save() {
  const PhaseScope phase(world_, flight::Phase::kSaving);
  const metrics::TraceSpan span(track_, "checkpoint", "step");
  finish_save();
  if (saved_step_ == step_) return;
  if (is_chief()) {
    watch_->metrics.flush();
    watch_->meter.progress(options_.save_timeout);  // training stands still until it is done
  }
  const bool durable = store_->save(progress(), model_.state());
  report_save(durable ? store_->last_save() : checkpoint::SaveResult{.step = step_});
}

void Trainer::advance_save() {
  const PhaseScope phase(world_, flight::Phase::kSaving);
  const metrics::TraceSpan span(track_, "checkpoint", "step");
  if (const auto result = store_->advance_save()) report_save(*result);
}

void Trainer::finish_save() {
  while (store_->is_saving()) advance_save();
}

void Trainer::report_save(const checkpoint::SaveResult& result) {
  if (result.durable) saved_step_ = result.step;
  save_interval_.saved(result);
  if (!is_chief()) return;
  if (result.durable)
    note("durable",
         {{"step", result.step}, {"epoch", epoch_}, {"save_s", result.seconds}, {"stall_s", result.stall_seconds}});
  watch_->save(result);
}

// What ends must be saved: storage may have been busy, so twice; then it is the user's turn.
void Trainer::save_at_last() {
  for (int tries = 0; saved_step_ != step_; ++tries) {
    if (tries == 2) {
      throw Error(
          ExitCode::kStorage,
          "step " + std::to_string(step_) + ", where this run ends, could not be saved; " +
              (saved_step_ < 0 ? "nothing is" : "step " + std::to_string(saved_step_) + " is the last that is") +
              ". Mend: look for the ERROR of saving it, make room or restore the storage of '" + options_.run_dir +
              "', and run again to go on from there");
    }
    save();
  }
}

// A log tells of the run; one that cannot be written does not end it.
void Trainer::note(const std::string& event, const nlohmann::ordered_json& fields) {
  try {
    watch_->ledger.append(event, fields.dump());
  } catch (const IoError& error) {
    LOG(WARNING) << error.what() << "; '" << event << "' of step " << step_ << " waits for the ledger's next event";
  }
}

void Trainer::stop_if_asked(bool asked) {
  if (!asked || step_ == options_.steps) return;
  save_at_last();
  if (is_chief()) {
    watch_->progress.finish();
    note("preempted", {{"step", step_}});
    sign_off();
  }
  throw Preempted("asked to stop by a signal: saved step " + std::to_string(saved_step_) + " of " +
                  std::to_string(options_.steps) + ". Run again to go on");
}

void Trainer::sign_off() {
  heartbeat_.reset();
  checkpoint::release_epoch(fs_, options_.run_dir, epoch_);
}

}  // namespace

Result train(ProcessGroup& world, at::Device device, Task& task, const Options& options, Fs& fs) {
  const PhaseScope phase(world, flight::Phase::kLoading);
  world.set_control_timeout(options.runtime.collective_timeout);  // before it is split
  return Trainer(world, device, task, options, fs).run();
}

}  // namespace lockstep::train
