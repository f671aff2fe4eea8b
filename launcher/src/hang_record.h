#pragma once

#include <span>
#include <string>

#include <lockstep/flight/verdict.h>

namespace lockstep::launcher {

/// Writes FOLDER/hang-<UTC time>-<host>.json, aside and then in place. Where that is not possible there is none.
void write_hang_record(const std::string& folder, const std::string& host, const flight::Verdict& verdict,
                       std::span<const flight::NodeReport> nodes);

}  // namespace lockstep::launcher
