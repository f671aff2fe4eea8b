#include "supervisor.h"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>

#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>

#include "cluster_watch.h"
#include "job.h"
#include "launch_folder.h"
#include "machine.h"
#include "machine_checks.h"
#include "open_mpi.h"
#include "run_state.h"
#include "stop_signals.h"
#include "verdict.h"

namespace lockstep::launcher {
namespace {

constexpr double kAnswerSeconds = 5;               // a host that takes longer to look at itself is no help
constexpr std::chrono::milliseconds kEnds{5'000};  // a process that waits for a dead disk takes longer
constexpr size_t kMostTold = 20;                   // failures at the end of the log; all were told when they happened
constexpr int kRunAgain = static_cast<int>(ExitCode::kRunAgain), kConfig = static_cast<int>(ExitCode::kConfig);

std::ostream& say() { return std::cerr << "lockstep: "; }

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

std::string seconds(std::chrono::milliseconds time) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << static_cast<double>(time.count()) / 1000 << " s";
  return text.str();
}

uint64_t random_seed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

// What an earlier launcher left is gone on with where it is certain that it is over: it was killed on this machine, or
// Slurm started its job anew. Where it ran elsewhere only its budget is taken over: two jobs must not seem to be one.
SupervisorState state_of(const Plan& plan, const std::optional<SupervisorState>& left) {
  const std::string batch_job = process_environment()("SLURM_JOB_ID").value_or("");
  SupervisorState state;
  const int64_t durable_step = newest_durable_step(plan.run_dir);
  state.policy.durable_step = durable_step;  // of an earlier job: no progress of this one
  const bool is_over = left && (is_dead_launcher(left->owner) || (!batch_job.empty() && left->batch_job == batch_job));
  if (left && (is_over || !is_launcher_here(left->owner))) state = *left;
  if (!is_over) {
    state.starts = 0;
    state.job_id = "run-" + std::to_string(random_seed());
    state.began_unix_s = unix_seconds();
    state.began_at = durable_step;
  }
  state.owner = launcher_name();
  state.batch_job = batch_job;
  return state;
}

class Supervisor {
 public:
  explicit Supervisor(const Plan& plan) : Supervisor(plan, load_supervisor_state(plan.run_dir)) {}

  int run() {
    if (const auto refusal = look_at_this_machine()) return finish(*refusal);
    for (;;) {
      const std::optional<Placement> placement = choose_placement();
      if (stop_requests() > 0) return finish({false, kRunAgain, {}, ""});
      if (!placement && plan_.in_slurm && slots_ < plan_.min_ranks) return finish(leave_allocation());
      const Ending ending = placement ? start(*placement) : nowhere_to_start();
      if (placement && is_refusal(ending, *placement)) {
        state_.refused.insert(placement->ranks());
        say() << "the program does not accept " << placement->ranks() << " ranks; trying fewer" << std::endl;
        continue;
      }
      const Decision decision = policy_.after(ending);
      if (!decision.goes_on) return finish(decision);
      state_.policy = policy_.state();
      keep_state();
      announce(decision);
      if (!wait_unless_stopped(decision.delay)) return finish({false, kRunAgain, {}, ""});
    }
  }

 private:
  Supervisor(const Plan& plan, const std::optional<SupervisorState>& left)
      : plan_(plan),
        // Another launcher that lives here keeps its own.
        keeps_state_(!left || !is_launcher_here(left->owner) || is_dead_launcher(left->owner)),
        run_dir_(plan.run_dir),
        found_run_dir_(::access(plan.run_dir.c_str(), F_OK) == 0),
        state_(state_of(plan, left)),
        policy_(plan.restarts, random_seed(), state_.policy) {
    for (const std::string& line : sweep_dead_launches(plan.run_dir)) say() << line << std::endl;
    if (state_.starts > 0)
      say() << "going on for a launcher that was killed; " << state_.policy.restarts_used << " of " << plan.restarts
            << " restarts are used" << std::endl;
  }

  std::optional<Decision> look_at_this_machine() const {
    if (std::none_of(plan_.hosts.begin(), plan_.hosts.end(),
                     [](const Host& host) { return is_this_machine(host.name); }))
      return std::nullopt;
    std::optional<Decision> refusal;
    for (const Finding& finding : short_look(run_dir_)) {
      if (finding.good) continue;
      std::cerr << finding << std::flush;
      if (finding.ends_run) refusal = {.exit_code = static_cast<int>(finding.code)};
    }
    return refusal;
  }

  /// Those that answer; what one of them lacks is told when it is asked for the first time.
  std::vector<Host> look_at(const std::vector<Host>& hosts) {
    const std::vector<std::string> agent = remote_agent(process_environment(), plan_.in_slurm);
    std::map<std::string, std::string> said;
    std::vector<Host> found = answering(hosts, agent, kAnswerSeconds, short_look_command(agent, run_dir_), &said);
    for (const auto& [host, findings] : said) {
      if (!looked_at_.insert(host).second) continue;
      for (Finding& finding : parse_findings(findings)) {
        if (finding.good) continue;
        finding.what.insert(0, host + ": ");
        std::cerr << finding << std::flush;
      }
    }
    return found;
  }

  std::optional<Placement> choose_placement() {
    std::vector<Host> hosts = plan_.hosts;
    std::erase_if(hosts, [&](const Host& host) { return is_excluded(host.name); });
    leave_out_lost(hosts);
    // Slurm has just looked at the nodes of a new job itself.
    if (!plan_.on_this_machine && !(plan_.in_slurm && state_.starts == 0)) hosts = look_at(hosts);
    missing_.clear();
    for (const Host& host : plan_.hosts) {
      if (std::find(hosts.begin(), hosts.end(), host) == hosts.end()) missing_.push_back(host.name);
    }
    slots_ = total_slots(hosts);
    return place(hosts, plan_.ranks, plan_.min_ranks, state_.refused);
  }

  /// Asking a host that has just fallen silent takes 5 s. It is asked again before the start after this one, or now
  /// where the others are too few.
  void leave_out_lost(std::vector<Host>& hosts) {
    std::vector<Host> left = hosts;
    std::erase_if(left,
                  [&](const Host& host) { return std::find(lost_.begin(), lost_.end(), host.name) != lost_.end(); });
    lost_.clear();
    if (place(left, plan_.ranks, plan_.min_ranks, state_.refused)) hosts = std::move(left);
  }

  bool is_excluded(const std::string& name) const {
    return std::find(state_.excluded.begin(), state_.excluded.end(), name) != state_.excluded.end();
  }

  // An allocation gets no other nodes: the next job does. Waiting here would only spend the budget.
  Decision leave_allocation() {
    return {.exit_code = kRunAgain, .why = "no answer from " + joined(missing_) + "; a new job has other nodes"};
  }

  Ending nowhere_to_start() {
    if (slots_ >= plan_.min_ranks) {  // every size that fits was refused: the program has said why
      first_failures_.emplace_back("the program accepts no number of ranks from " + std::to_string(plan_.min_ranks) +
                                   " to " + std::to_string(std::min(slots_, plan_.ranks)));
      return {.exit_code = kConfig};
    }
    first_failures_.push_back("no answer from " + joined(missing_) + ": " + std::to_string(slots_) + " of " +
                              std::to_string(plan_.ranks) + " ranks have a place, and --min_ranks is " +
                              std::to_string(plan_.min_ranks));
    say() << first_failures_.back() << std::endl;
    return {.exit_code = kRunAgain, .cause = Cause::kLostHost, .durable_step = newest_durable_step(run_dir_)};
  }

  Ending start(const Placement& placement) {
    ++state_.starts;
    LaunchFolder folder(run_dir_);
    keep_state();  // one that follows a killed launcher knows which start was the last
    Job job{.command = {},
            .under_mpirun = !plan_.mpirun.empty(),
            .grace = plan_.grace,
            .environment = {{"LOCKSTEP_LAUNCH_DIR", folder.records().folder()},
                            {"LOCKSTEP_JOB_ID", state_.job_id},
                            {"LOCKSTEP_JOB_START", std::to_string(state_.starts)}},
            .records = folder.records()};
    if (job.under_mpirun) prepare_mpirun(job, folder, placement);
    if (!plan_.on_this_machine && run_dir_.empty() && state_.starts == 1)
      say() << "no --run_dir is named among the program's flags, so hosts do not tell what became of their ranks, and "
               "mpirun's exit code stands for success. Mend: --run_dir=FOLDER that all hosts see"
            << std::endl;
    // Agents on other hosts find it in the run directory that all see; without one they decide alone.
    const std::unique_ptr<ClusterWatch> watch =
        plan_.on_this_machine || run_dir_.empty() ? nullptr
                                                  : ClusterWatch::start(placement, folder.records().folder(), run_dir_);
    job.watch = watch.get();
    job.command.insert(job.command.end(), plan_.program.begin(), plan_.program.end());
    const int64_t killed_before = out_of_memory_kills();
    JobEnd end = run_job(job);
    if (watch) {
      watch->finish(end);
      if (const auto& found = watch->finding() ? watch->finding() : watch->loss()) lost_ = found->lost_hosts;
    }
    for (const pid_t pid : end_processes_of(folder.records().folder(), kEnds))
      say() << "process " << pid << " cannot be ended; is a disk or a device gone?" << std::endl;
    Verdict verdict = judge({.end = std::move(end),
                             .under_mpirun = job.under_mpirun,
                             .on_several_hosts = !plan_.on_this_machine,
                             .was_ready = job.records.is_ready(),
                             .done = job.records.done(),
                             .failures = job.records.failures(),
                             .out_of_memory_kills = out_of_memory_kills() - killed_before,
                             .finding = watch ? watch->finding() : std::nullopt,
                             .death = watch ? watch->death() : std::nullopt,
                             .loss = watch ? watch->loss() : std::nullopt});
    return complete(std::move(verdict), placement);
  }

  void prepare_mpirun(Job& job, const LaunchFolder& folder, const Placement& placement) {
    MpirunStart start{.mpirun = plan_.mpirun,
                      .placement = placement,
                      .on_this_machine = plan_.on_this_machine,
                      .in_slurm = plan_.in_slurm,
                      .tag_output = plan_.tag_output,
                      .bind_to_cores = plan_.bind_to_cores,
                      .cores = plan_.cores,
                      .hostfile = folder.session() + "/hostfile",
                      .session = folder.session(),
                      .shared_memory = folder.shared_memory()};
    job.environment.merge(open_mpi_environment(start, process_environment()));
    std::vector<std::string> forwarded = forwarded_variables(environ);
    forwarded.insert(forwarded.end(), {"LOCKSTEP_LAUNCH_DIR", "LOCKSTEP_JOB_ID", "LOCKSTEP_JOB_START"});
    job.command = mpirun_command(start, forwarded);
    if (plan_.on_this_machine) {
      say() << Placement{.hosts = {{own_name(), placement.ranks()}}, .spares = {}}.describe() << std::endl;
      return;
    }
    write_durable(real_fs(), start.hostfile, hostfile_text(placement), 0600);
    say() << placement.describe() << (missing_.empty() ? "" : "; not used: " + joined(missing_)) << std::endl;
  }

  void keep_state() const {
    if (keeps_state_) save_supervisor_state(run_dir_, state_);
  }

  /// What only the run directory knows.
  Ending complete(Verdict verdict, const Placement& placement) {
    Ending& ending = verdict.ending;
    if (run_dir_.empty()) run_dir_ = program_run_dir(plan_.program);  // it is there by now
    ending.durable_step = newest_durable_step(run_dir_);
    // One that was killed could not say where it was; one that refuses its flags was nowhere yet.
    if (verdict.first_failure && !ending.step && ending.exit_code != kConfig) {
      ending.step = last_reported_step(run_dir_);
      if (ending.step && ending.was_ready) *verdict.first_failure += ", about step " + std::to_string(*ending.step);
    }
    if (ending.exit_code == static_cast<int>(ExitCode::kNodeBad)) exclude_faulty_hosts(ending, placement);
    if (verdict.first_failure) first_failures_.push_back(*verdict.first_failure);
    return ending;
  }

  void exclude_faulty_hosts(Ending& ending, const Placement& placement) {
    if (plan_.on_this_machine) return;
    for (const int64_t rank : faulty_ranks(run_dir_)) {
      if (rank < 0 || rank >= placement.ranks()) continue;
      state_.excluded.push_back(placement.host_of(rank));
      ending.can_do_without_host = true;
    }
    std::vector<Host> left = plan_.hosts;
    std::erase_if(left, [&](const Host& host) { return is_excluded(host.name); });
    ending.can_do_without_host &= place(left, plan_.ranks, plan_.min_ranks, state_.refused).has_value();
  }

  /// A smaller world that the program refused before its first step: another size may do.
  bool is_refusal(const Ending& ending, const Placement& placement) const {
    return ending.exit_code == kConfig && !ending.was_asked && !ending.step && placement.ranks() < plan_.ranks;
  }

  void announce(const Decision& decision) const {
    const int64_t durable = state_.policy.durable_step;
    if (!first_failures_.empty()) say() << "first failure: " << first_failures_.back() << "\n";
    say() << "starting again" << (durable >= 0 ? " from step " + std::to_string(durable) : "")
          << (decision.delay.count() > 0 ? " in " + seconds(decision.delay) : "") << ", restart "
          << state_.policy.restarts_used << " of " << plan_.restarts << std::endl;
  }

  /// The effective training time ratio: saves, starts, evaluation and steps that were lost are the rest.
  void tell_effective_time() const {
    const double in_steps = seconds_in_steps(run_dir_, state_.began_at, newest_durable_step(run_dir_));
    const double all = unix_seconds() - state_.began_unix_s;
    if (in_steps <= 0 || all <= 0) return;
    const auto text = [](double time) { return seconds(std::chrono::milliseconds(std::llround(time * 1000))); };
    say() << "effective training time " << std::lround(100 * in_steps / all) << " %: " << text(in_steps) << " of "
          << text(all) << " went into steps that stay" << std::endl;
  }

  int finish(const Decision& decision) {
    const auto kept = load_supervisor_state(run_dir_);
    if (kept && kept->owner == state_.owner) remove_supervisor_state(run_dir_);
    if (!run_dir_.empty()) ::rmdir((run_dir_ + "/launch").c_str());
    if (!run_dir_.empty() && !found_run_dir_) ::rmdir(run_dir_.c_str());  // of a program that refused its flags
    tell_effective_time();
    if (decision.exit_code == 0) return 0;
    if (first_failures_.size() == 1) say() << "first failure: " << first_failures_.front() << "\n";
    const size_t count = first_failures_.size();
    for (size_t i = count > kMostTold ? count - kMostTold : 0; count > 1 && i < count; ++i)
      say() << "first failure of start " << i + 1 << ": " << first_failures_[i] << "\n";
    if (!decision.why.empty()) say() << decision.why << "\n";
    say() << "the job ended with exit code " << decision.exit_code
          << (decision.exit_code == kRunAgain ? "; run the same command again to go on" : "") << std::endl;
    return decision.exit_code;
  }

  const Plan& plan_;
  const bool keeps_state_;
  std::string run_dir_;
  const bool found_run_dir_;
  SupervisorState state_;
  RestartPolicy policy_;
  std::vector<std::string> first_failures_, missing_;
  std::vector<std::string> lost_;  // found silent in the last start
  std::set<std::string> looked_at_;
  int64_t slots_ = 0;  // of the hosts that answered last
};

}  // namespace

int supervise(const Plan& plan) {
  install_stop_signals();
  return Supervisor(plan).run();
}

}  // namespace lockstep::launcher
