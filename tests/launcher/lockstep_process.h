#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <sys/types.h>

namespace lockstep {

/// `lockstep` started with these words, its output kept. Ended with SIGKILL when it is still there in the destructor.
class LockstepProcess {
 public:
  explicit LockstepProcess(const std::vector<std::string>& words, const std::map<std::string, std::string>& env = {});
  LockstepProcess(const LockstepProcess&) = delete;
  LockstepProcess& operator=(const LockstepProcess&) = delete;
  ~LockstepProcess();

  void send(int signal) const;
  void kill_child() const;  ///< SIGKILL to its one child: mpirun
  int open_files() const;   ///< how many it has
  /// Its exit code; 1000 + S for an end by signal S.
  int wait();
  std::string out() const { return text_of(out_path_); }
  std::string err() const { return text_of(err_path_); }

 private:
  static std::string text_of(const std::string& path);

  std::string out_path_, err_path_;
  pid_t pid_ = -1;
};

struct Ended {
  int code;
  std::string out, err;
};
Ended lockstep_run(const std::vector<std::string>& words, const std::map<std::string, std::string>& env = {});

/// The pids that `ranks` ranks of launched_rank left in a folder; nullopt: not all are there after 20 s.
std::optional<std::vector<pid_t>> wait_for_ranks(const std::string& folder, int ranks);
/// Whether none of them runs (a zombie counts as gone) before `seconds` are over.
bool are_gone(const std::vector<pid_t>& pids, double seconds);
bool becomes_true(double seconds, const std::function<bool()>& condition);
/// The TCP ports, "ADDRESS:PORT" in hexadecimal, at which processes of this user listen.
std::set<std::string> listening_ports();
/// The files of /dev/shm these processes have open in memory.
std::set<std::string> mapped_segments(const std::vector<pid_t>& pids);

inline const std::string kRank = LOCKSTEP_BINARY_DIR "/tests/launched_rank";

}  // namespace lockstep
