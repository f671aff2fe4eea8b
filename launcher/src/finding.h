#pragma once

#include <iosfwd>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>

#include "hosts.h"

namespace lockstep::launcher {

/// One line of `lockstep doctor`.
struct Finding {
  std::string what;
  bool good = true;
  std::string found;
  std::string mend;
  ExitCode code = ExitCode::kConfig;  ///< what a bad one means; kNodeBad: another machine may do
  bool ends_run = false;              ///< no training without a mend
};

/// The line people read; a bad one is followed by its mend.
std::ostream& operator<<(std::ostream& out, const Finding& finding);

/// An object of `lockstep doctor --json`; what another host's doctor said is read back from it.
nlohmann::ordered_json to_json(const Finding& finding);
/// What another host's doctor said, whatever greetings stand around it. @return nothing for anything else.
std::vector<Finding> parse_findings(const std::string& said);

/// Looks at each host through `agent` (ssh, or what stands for it) and at what is between them: a line for each host,
/// its bad findings, whether the hosts are alike, their clocks, whether storage is shared, and an all-reduce.
///
/// @param run_dir      absolute; this machine must be able to write there.
/// @param doctor_flags of the look at each host.
std::vector<Finding> examine_hosts(const std::vector<Host>& hosts, const std::vector<std::string>& agent,
                                   const std::string& run_dir, const std::vector<std::string>& doctor_flags);

}  // namespace lockstep::launcher
