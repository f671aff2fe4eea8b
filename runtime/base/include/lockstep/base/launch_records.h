#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <lockstep/base/rank_info.h>

namespace lockstep {

/// How a rank ended wrongly, in its own words.
struct FailureRecord {
  int rank = 0;
  int exit_code = 0;
  int signal = 0;  ///< that it died by; 0: it ended by an exception
  std::string message, host;
  std::optional<int64_t> step;  ///< the last step that note_step() was told
};

/// Small files by which the ranks of one start tell whoever started them how it goes. A pipe loses what ranks say in
/// their last half second (Open MPI 5), and mpirun's exit code may be 0 although a host was lost; files stay.
///
/// Files, each written aside and renamed, so that it is whole or not there:
///   ready      {}                        rank 0: the world is up, so every rank has its signal handlers
///   done       {"exit_code":0|75}        rank 0: the world was closed in good order
///   failure.R  {"exit_code":70,"signal":11,"message":"...","host":"...","step":7}   rank R; signal and step if any
/// Threads: any. Writers never throw: a record that cannot be written costs a WARNING.
class LaunchRecords {
 public:
  /// @param folder a folder all hosts of the job see; empty: nobody asked, and nothing is written or found.
  explicit LaunchRecords(std::string folder) : folder_(std::move(folder)) {}
  /// Of $LOCKSTEP_LAUNCH_DIR.
  static LaunchRecords from_environment(const Environment& environment);
  const std::string& folder() const { return folder_; }

  void say_ready() const { write("ready", "{}"); }
  void say_done(int exit_code) const { write("done", "{\"exit_code\":" + std::to_string(exit_code) + "}"); }
  /// The first word of a rank stays: what a crash says after an exception is its consequence.
  void say_failed(int rank, int exit_code, const std::string& message) const;
  /// From now on SIGSEGV, SIGBUS, SIGFPE and SIGABRT leave failure.<rank>, the name of the signal and a stack on
  /// standard error, and then end the process as they would have. A handler that is there already, a sanitizer's,
  /// stays.
  void record_crashes(int rank, int world_size) const;

  bool is_ready() const;
  std::optional<int> done() const;  ///< its exit code
  /// By rank. A file that is no record is passed over.
  std::vector<FailureRecord> failures() const;
  /// Removes the files above and nothing else.
  void remove() const;

 private:
  void write(const std::string& name, const std::string& text) const;

  std::string folder_;
};

/// The step this process is at, for its failure record. Cheap; one for the process, as signal handlers need it.
void note_step(int64_t step) noexcept;

}  // namespace lockstep
