#include "workers.h"

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <lockstep/base/error.h>

namespace lockstep::fuzz {
namespace {

using Clock = std::chrono::steady_clock;

void require(bool ok, const char* doing) {
  if (!ok) throw IoError(doing, "a worker", errno);
}

// One process, given one case after the other.
class Worker {
 public:
  Worker(const WorkerOptions& options, int number)
      : options_(options), work_dir_(options.work_dir + "/worker" + std::to_string(number)) {}
  ~Worker() { stop(); }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void give(const Case& c) {
    if (pid_ < 0) start();
    const std::string line = to_text(c) + "\n";
    // One that has died is found when it is read from.
    if (write(to_, line.data(), line.size()) < 0) answer_.clear();
    case_ = c;
    deadline_ = Clock::now() + 4 * options_.timeout;
  }

  bool is_busy() const { return case_.has_value(); }
  int fd() const { return from_; }
  const Case& current() const { return *case_; }

  // Called when there is something to read, and now and then. The verdict, when there is one.
  std::optional<Verdict> look(bool is_readable) {
    if (is_readable) {
      char piece[4096];
      const ssize_t n = read(from_, piece, sizeof(piece));
      if (n <= 0) return Verdict{Verdict::kDied, "the process of the ranks " + how_it_ended()};
      answer_.append(piece, static_cast<size_t>(n));
      if (answer_.back() == '\n') return parse_answer();
    }
    if (Clock::now() < deadline_) return std::nullopt;
    stop();
    return Verdict{Verdict::kHung, "no end within " + std::to_string(4 * options_.timeout.count() / 1000) + " s"};
  }

  void finish() {
    case_.reset();
    answer_.clear();
  }

 private:
  void start() {
    std::filesystem::create_directories(work_dir_);
    int to[2], from[2];
    require(pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0, "making pipes for");
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_adddup2(&files, to[0], STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&files, from[1], STDOUT_FILENO);
    if (!options_.shows_log) posix_spawn_file_actions_addopen(&files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    const std::string self = std::filesystem::read_symlink("/proc/self/exe");
    std::vector<std::string> words = {self, "--worker=" + work_dir_,
                                      "--timeout_s=" + std::to_string(options_.timeout.count() / 1000)};
    std::vector<char*> arguments(words.size() + 1);  // ends with a null
    std::transform(words.begin(), words.end(), arguments.begin(), [](std::string& word) { return word.data(); });
    errno = posix_spawn(&pid_, self.c_str(), &files, nullptr, arguments.data(), environ);
    posix_spawn_file_actions_destroy(&files);
    require(errno == 0, "starting");
    close(to[0]), close(from[1]);
    to_ = to[1], from_ = from[0];
  }

  void stop() {
    if (pid_ < 0) return;
    kill(pid_, SIGKILL);
    how_it_ended();
  }

  std::string how_it_ended() {
    close(to_), close(from_);
    int status = 0;
    waitpid(std::exchange(pid_, -1), &status, 0);
    std::error_code ignored;
    std::filesystem::remove_all(work_dir_, ignored);
    return WIFSIGNALED(status) ? "died of signal " + std::to_string(WTERMSIG(status))
                               : "exited with " + std::to_string(WEXITSTATUS(status));
  }

  Verdict parse_answer() {
    answer_.pop_back();
    const size_t space = answer_.find(' ');
    return {static_cast<Verdict::Kind>(std::stoi(answer_.substr(0, space))), answer_.substr(space + 1)};
  }

  const WorkerOptions& options_;
  std::string work_dir_, answer_;
  pid_t pid_ = -1;
  int to_ = -1, from_ = -1;
  std::optional<Case> case_;
  Clock::time_point deadline_;
};

}  // namespace

void run_on_workers(const WorkerOptions& options, const std::function<std::optional<Case>()>& next,
                    const std::function<bool(const Case&, const Verdict&)>& done) {
  std::vector<std::unique_ptr<Worker>> workers;
  workers.reserve(options.jobs);
  for (int i = 0; i < options.jobs; ++i) workers.push_back(std::make_unique<Worker>(options, i));
  for (bool has_more = true;;) {
    std::vector<pollfd> polled;
    std::vector<Worker*> busy;
    for (auto& worker : workers) {
      if (has_more && !worker->is_busy()) {
        const std::optional<Case> c = next();
        has_more = c.has_value();
        if (c) worker->give(*c);
      }
      if (!worker->is_busy()) continue;
      polled.push_back({worker->fd(), POLLIN, 0});
      busy.push_back(worker.get());
    }
    if (busy.empty()) return;
    poll(polled.data(), polled.size(), 1000);
    for (size_t i = 0; i < busy.size(); ++i) {
      const std::optional<Verdict> verdict = busy[i]->look(polled[i].revents != 0);
      if (!verdict) continue;
      const Case c = busy[i]->current();
      busy[i]->finish();
      if (!done(c, *verdict)) return;
    }
  }
}

Verdict run_on_worker(const WorkerOptions& options, const Case& c) {
  Verdict verdict;
  std::optional<Case> left = c;
  run_on_workers(
      options, [&] { return std::exchange(left, std::nullopt); },
      [&](const Case&, const Verdict& its) {
        verdict = its;
        return true;
      });
  return verdict;
}

int be_worker(const std::string& work_dir, std::chrono::milliseconds timeout) {
  for (std::string line; std::getline(std::cin, line);) {
    Verdict verdict = run_case(parse(line), work_dir, timeout);
    std::replace(verdict.text.begin(), verdict.text.end(), '\n', ' ');
    std::cout << verdict.kind << ' ' << verdict.text << std::endl;
  }
  return 0;
}

}  // namespace lockstep::fuzz
