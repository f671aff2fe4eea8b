#include "failure_scan.h"

#include <charconv>
#include <regex>

#include "machine.h"

namespace lockstep::launcher {

void FailureScan::feed(std::string_view bytes) {
  constexpr size_t kLongest = 4096;  // of a line without an end only the beginning is kept
  for (const char c : bytes) {
    if (c == '\n' || c == '\r') {  // a progress line redraws itself after '\r'
      take_line(line_);
      line_.clear();
    } else if (line_.size() < kLongest) {
      line_ += c;
    }
  }
}

// The texts are those of Open MPI 4.1 and 5.0 (PRRTE 3.0); one that does not match only makes the last line poorer.
void FailureScan::take_line(std::string_view text) {
  constexpr std::string_view kErase = "\033[K";  // the progress line's
  while (text.substr(0, kErase.size()) == kErase) text.remove_prefix(kErase.size());
  const std::string line(text);
  std::smatch match;
  if (first_error_.empty() && line.rfind("E ", 0) == 0 && line.find(" [rank ") != std::string::npos) {
    first_error_ = line.substr(line.find("[rank "));
    return;
  }
  // Regular expressions only for lines of mpirun's reports: a chatty program must not pay for them.
  if (died_rank_.empty() && line.find("noticed that process rank") != std::string::npos) {
    static const std::regex kRank("process rank (\\d+)");
    if (std::regex_search(line, match, kRank)) died_rank_ = match[1].str();
  }
  if (died_.empty() && !died_rank_.empty() && line.find("signal ") != std::string::npos) {  // 5.0 says it a line later
    static const std::regex kSignal("signal (\\d+)");
    if (std::regex_search(line, match, kSignal))
      died_ = "rank " + died_rank_ + " died by signal " + match[1].str() + " (" +
              signal_name(std::stoi(match[1].str())) + ")";
  } else if (ended_rank_.empty() && line.find("Process name: [") != std::string::npos) {
    static const std::regex kName("Process name: \\[.*,(\\d+)\\]");
    if (std::regex_search(line, match, kName)) ended_rank_ = match[1].str();
  } else if (ended_.empty() && !ended_rank_.empty() && line.find("Exit code:") != std::string::npos) {
    static const std::regex kCode("Exit code: *(\\d+)");
    if (std::regex_search(line, match, kCode))
      ended_ = "rank " + ended_rank_ + " ended with exit code " + match[1].str();
  } else if (ended_.empty() && line.find("MPI_ABORT was invoked on rank") != std::string::npos) {
    static const std::regex kAbort("invoked on rank (\\d+)");
    if (std::regex_search(line, match, kAbort)) ended_ = "rank " + match[1].str() + " called MPI_Abort";
  }
  for (const char* words :
       {"not enough slots available", "was unable to launch", "was unable to find the specified", "unable to start",
        "An internal error has occurred in ORTE", "unable to allocate the requested", "Unknown option"}) {
    could_not_start_ |= line.find(words) != std::string::npos;
  }
  for (const char* words : {"lost communication with a remote daemon", "daemon has unexpectedly failed",
                            "unable to reliably start one or more daemons"}) {
    lost_host_ |= line.find(words) != std::string::npos;
  }
}

std::optional<int> FailureScan::dead_rank() const {
  int rank = 0;
  const char* end = died_rank_.data() + died_rank_.size();
  return std::from_chars(died_rank_.data(), end, rank).ec == std::errc() ? std::optional(rank) : std::nullopt;
}

std::optional<std::string> FailureScan::first_failure() const {
  // A rank that was killed says nothing; what its peers then log is the consequence.
  if (!died_.empty()) return died_ + (first_error_.empty() ? "" : "\n  first error logged: " + first_error_);
  if (!first_error_.empty()) return first_error_;
  if (!ended_.empty()) return ended_;
  return std::nullopt;
}

}  // namespace lockstep::launcher
