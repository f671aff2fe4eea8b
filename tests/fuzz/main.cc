// fuzz_layouts: README.md.
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <thread>

#include <gflags/gflags.h>

#include <lockstep/base/error.h>
#include <lockstep/base/planted_bug.h>

#include "workers.h"

DEFINE_int64(seeds, 100, "how many cases");
DEFINE_int64(first_seed, 1, "of the first case");
DEFINE_int32(jobs, 0, "processes side by side; 0: cores");
DEFINE_string(replay, "", "one case, as a failure printed it; shows what its runs say");
DEFINE_string(cases, "", "instead of seeds: a file with a case on each line, or a # and a remark");
DEFINE_string(plant, "", "a bug to plant (--check_plants lists them)");
DEFINE_bool(check_plants, false, "plants each bug, or those of --plant=a,b, and looks for it: all must be found");
DEFINE_bool(shrink, true, "make a failing case simpler");
DEFINE_bool(keep_going, false, "tell of every seed that fails, as it is");
DEFINE_int32(timeout_s, 30, "of a collective: a rank that waits longer waits in vain");
DEFINE_string(worker, "", "(internal) work on cases from stdin in this folder");

namespace lockstep::fuzz {
namespace {

// A folder that is gone at the end.
class WorkDir {
 public:
  WorkDir() : path_(std::filesystem::temp_directory_path() / "fuzz_layouts_XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) throw IoError("making", path_, errno);
  }
  ~WorkDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  WorkDir(const WorkDir&) = delete;
  WorkDir& operator=(const WorkDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

struct Failure {
  Case c;
  Verdict verdict;
};

void print(const Failure& failure) {
  std::cout << "FAILED: seed " << failure.c.seed << "\n  " << failure.verdict.text << "\n  case: " << to_text(failure.c)
            << std::endl;
}

using NextCase = std::function<std::optional<Case>()>;

NextCase cases_of_seeds(int64_t first_seed, int64_t seeds, const std::string& plant) {
  return [=, seed = first_seed]() mutable -> std::optional<Case> {
    if (seed == first_seed + seeds) return std::nullopt;
    Case c = draw(seed++);
    c.plant = plant;
    return c;
  };
}

NextCase cases_of_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw IoError("reading", path, errno);
  std::vector<Case> cases;
  for (std::string line; std::getline(file, line);) {
    if (!line.empty() && line[0] != '#') cases.push_back(parse(line));
  }
  if (cases.empty()) throw ConfigError(path + " holds no case. Mend: a line for each, as a failure prints it");
  return [cases = std::move(cases), next = size_t{0}]() mutable {
    return next < cases.size() ? std::optional(cases[next++]) : std::nullopt;
  };
}

// The first failure; with --keep_going the last, and all are printed.
std::optional<Failure> search(const WorkerOptions& options, const NextCase& next) {
  std::optional<Failure> failure;
  run_on_workers(options, next, [&](const Case& c, const Verdict& verdict) {
    if (verdict.kind == Verdict::kSame) return true;
    failure = {c, verdict};
    if (FLAGS_keep_going) print(*failure);
    return FLAGS_keep_going;
  });
  return failure;
}

// What failed, as far as another case can fail in the same way: of a message what comes before its first number.
std::pair<Verdict::Kind, std::string> way_of(const Verdict& verdict) {
  const bool has_message = verdict.kind == Verdict::kThrew || verdict.kind == Verdict::kRefused;
  return {verdict.kind, has_message ? verdict.text.substr(0, verdict.text.find_first_of("0123456789")) : ""};
}

constexpr std::chrono::minutes kShrinkLimit{5};  // cases that hang take long

// Simpler cases that fail in the same way, one number at a time, until none does.
Failure shrunk(const WorkerOptions& options, Failure failure) {
  const auto deadline = std::chrono::steady_clock::now() + kShrinkLimit;
  for (bool has_changed = true; has_changed;) {
    has_changed = false;
    auto candidates = simpler(failure.c);
    size_t next = 0;
    const auto way = way_of(failure.verdict);
    run_on_workers(
        options,
        [&]() -> std::optional<Case> {
          if (next == candidates.size() || std::chrono::steady_clock::now() > deadline) return std::nullopt;
          return candidates[next++];
        },
        [&](const Case& c, const Verdict& verdict) {
          if (way_of(verdict) != way) return true;
          failure = {c, verdict};
          has_changed = true;
          return false;
        });
  }
  return failure;
}

int fuzz(const WorkerOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  auto failure = search(options, FLAGS_cases.empty() ? cases_of_seeds(FLAGS_first_seed, FLAGS_seeds, FLAGS_plant)
                                                     : cases_of_file(FLAGS_cases));
  if (!failure) {
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::cout << (FLAGS_cases.empty() ? std::to_string(FLAGS_seeds) + " seeds from " + std::to_string(FLAGS_first_seed)
                                      : FLAGS_cases)
              << ": all as one process, in " << took.count() << " s" << std::endl;
    return 0;
  }
  if (FLAGS_keep_going) return 1;
  print(*failure);
  if (FLAGS_shrink) {
    std::cout << "making it simpler ..." << std::endl;
    failure = shrunk(options, *failure);
    print(*failure);
  }
  std::cout << "  again: fuzz_layouts --replay='" << to_text(failure->c) << "'" << std::endl;
  return 1;
}

// The first case that fails because of the bug: without it, it does not.
std::optional<Failure> find_plant(const WorkerOptions& options, const std::string& plant) {
  const int64_t end = FLAGS_first_seed + FLAGS_seeds;
  for (int64_t seed = FLAGS_first_seed; seed < end;) {
    auto failure = search(options, cases_of_seeds(seed, end - seed, plant));
    if (!failure) return std::nullopt;
    Case sound = failure->c;
    sound.plant.clear();
    if (run_on_worker(options, sound).kind == Verdict::kSame) return failure;
    std::cout << "(seed " << sound.seed << " fails without a planted bug)" << std::endl;
    seed = sound.seed + 1;
  }
  return std::nullopt;
}

int check_plants(const WorkerOptions& options) {
  int missed = 0;
  for (const auto& [name, plant] : kPlants) {
    const std::string wanted = "," + FLAGS_plant + ",";
    if (!FLAGS_plant.empty() && wanted.find("," + std::string(name) + ",") == std::string::npos) continue;
    const auto failure = find_plant(options, std::string(name));
    missed += failure ? 0 : 1;
    if (failure)
      std::cout << name << ": found by seed " << failure->c.seed << ": " << failure->verdict.text << std::endl;
    else
      std::cout << name << ": MISSED in " << FLAGS_seeds << " seeds" << std::endl;
  }
  return missed == 0 ? 0 : 1;
}

int replay(WorkerOptions options) {
  options.shows_log = true;
  const Case c = parse(FLAGS_replay);
  const Verdict verdict = run_on_worker(options, c);
  if (verdict.kind == Verdict::kSame) {
    std::cout << "as one process: " << to_text(c) << std::endl;
    return 0;
  }
  print({c, verdict});
  return 1;
}

int run() {
  const WorkDir work_dir;
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  const WorkerOptions options{.jobs = FLAGS_jobs > 0 ? FLAGS_jobs : cores,
                              .work_dir = work_dir.path(),
                              .timeout = std::chrono::seconds(FLAGS_timeout_s)};
  if (!FLAGS_replay.empty()) return replay(options);
  return FLAGS_check_plants ? check_plants(options) : fuzz(options);
}

}  // namespace
}  // namespace lockstep::fuzz

int main(int argc, char** argv) {
  gflags::SetUsageMessage("runs random models on random layouts and compares them with one process");
  gflags::ParseCommandLineFlags(&argc, &argv, true);
  signal(SIGPIPE, SIG_IGN);  // a worker that died is found when it is read from
  try {
    if (!FLAGS_worker.empty()) return lockstep::fuzz::be_worker(FLAGS_worker, std::chrono::seconds(FLAGS_timeout_s));
    return lockstep::fuzz::run();
  } catch (const lockstep::Error& error) {
    std::cerr << "fuzz_layouts: " << error.what() << "\n";
    return static_cast<int>(error.exit_code());
  }
}
