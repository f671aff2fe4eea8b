#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace lockstep::launcher {

/// Reads along with what the ranks and mpirun write to standard error and remembers how the trouble began, so that the
/// end of a long log can say it in one line.
///
/// Threads: one.
class FailureScan {
 public:
  /// The next bytes, cut anywhere.
  void feed(std::string_view bytes);

  /// The first failure, e.g. "rank 3 died by signal 9 (Killed)" or the first ERROR line; nullopt: none was seen.
  std::optional<std::string> first_failure() const;
  /// The rank that mpirun says died by a signal, and so ended the job.
  std::optional<int> dead_rank() const;
  /// Whether mpirun said that it could not start the ranks at all.
  bool could_not_start() const { return could_not_start_; }
  /// Whether mpirun said that a host, or its daemon there, is gone.
  bool lost_host() const { return lost_host_; }

 private:
  void take_line(std::string_view line);

  std::string line_;                    // not ended yet
  std::string first_error_;             // the first ERROR line of our logging
  std::string died_, ended_;            // mpirun's own words on the rank that ended the job
  std::string died_rank_, ended_rank_;  // of reports that go on in a later line
  bool could_not_start_ = false, lost_host_ = false;
};

}  // namespace lockstep::launcher
