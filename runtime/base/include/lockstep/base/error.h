#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace lockstep {

/// Exit codes of every lockstep program (DESIGN 4 is the authority; the sysexits.h meaning where there is one).
enum class ExitCode : int {
  kDone = 0,
  kBadData = 65,        ///< corrupt data, or no good checkpoint left
  kBug = 70,            ///< an invariant broke
  kFenced = 73,         ///< a newer start owns this run directory
  kStorage = 74,        ///< storage failed after retries
  kRunAgain = 75,       ///< stopped and saved, or a peer was lost: run again to go on
  kHang = 76,           ///< a collective hung
  kRestartsSpent = 77,  ///< the supervisor's restart budget is spent
  kConfig = 78,         ///< flags, files or environment a person must change
  kNodeBad = 79,        ///< this node is bad
};

/// Base of all our errors: a message that says what, with numbers, where, and how to mend, plus the exit code it leads
/// to.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode exit_code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// A person must change a flag, file or environment.
class ConfigError : public Error {
 public:
  explicit ConfigError(const std::string& message) : Error(ExitCode::kConfig, message) {}
};

/// A checkpoint or data shard fails its checksum or its format.
class CorruptData : public Error {
 public:
  explicit CorruptData(const std::string& message) : Error(ExitCode::kBadData, message) {}
};

/// Storage failed; carries path and errno.
class IoError : public Error {
 public:
  /// Message becomes "<doing> '<path>': <strerror> (errno N)".
  IoError(const std::string& doing, const std::string& path, int error_number);
  const std::string& path() const noexcept { return path_; }
  int error_number() const noexcept { return error_number_; }

 private:
  std::string path_;
  int error_number_;
};

/// A peer, link or node went away, or time ran out; the group is unusable afterwards.
class CollectiveError : public Error {
 public:
  explicit CollectiveError(const std::string& message, ExitCode code = ExitCode::kRunAgain) : Error(code, message) {}
};

/// With --check_collectives: two ranks called with different shapes, dtypes or operations.
class ShapeMismatch : public Error {
 public:
  explicit ShapeMismatch(const std::string& message) : Error(ExitCode::kBug, message) {}
};

/// The run was asked to stop, saved, and stops.
class Preempted : public Error {
 public:
  explicit Preempted(const std::string& message) : Error(ExitCode::kRunAgain, message) {}
};

/// A node computes or remembers wrongly: the run goes on without it.
class NodeFault : public Error {
 public:
  explicit NodeFault(const std::string& message) : Error(ExitCode::kNodeBad, message) {}
};

/// Another, newer start owns this run directory.
class Fenced : public Error {
 public:
  explicit Fenced(const std::string& message) : Error(ExitCode::kFenced, message) {}
};

/// A broken invariant: a bug of ours. Thrown by LOCKSTEP_CHECK.
class CheckFailed : public Error {
 public:
  explicit CheckFailed(const std::string& message) : Error(ExitCode::kBug, message) {}
};

namespace internal {
/// Collects the streamed message of a failed LOCKSTEP_CHECK and throws at the end of the statement.
class CheckThrower {
 public:
  CheckThrower(const char* condition, const char* file, int line);
  CheckThrower(const CheckThrower&) = delete;
  CheckThrower& operator=(const CheckThrower&) = delete;
  [[noreturn]] ~CheckThrower() noexcept(false);  // NOLINT(bugprone-exception-escape): to throw is what it is for
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};
}  // namespace internal

/// The exit code for whatever is in flight in a catch block, with its message (c10 errors without their backtrace).
/// Anything that is not an Error counts as a bug (70).
struct Failure {
  ExitCode code;
  std::string message;
};
Failure describe_current_exception();

}  // namespace lockstep

/// LOCKSTEP_CHECK(count > 0) << "bucket " << b << " is empty": throws CheckFailed with the condition's text, file and
/// line.
#define LOCKSTEP_CHECK(condition) \
  if (condition) {                \
  } else                          \
    ::lockstep::internal::CheckThrower(#condition, __FILE__, __LINE__).stream()
