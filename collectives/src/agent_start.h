#pragma once

#include <string>

namespace lockstep {

/// Whether LOCKSTEP_AGENT lets a job have its watchdog.
bool wants_agent();

/// Starts the node's agent, `lockstep agent`, in a session of its own: what LOCKSTEP_AGENT names, else the `lockstep`
/// beside this program or on PATH. LOCKSTEP_AGENT=none: wants_agent() says no.
/// @return its pid, which ends at once after it has put the agent into the background; -1: there is none, after a
/// warning.
int start_agent(const std::string& job_key, int local_size);

}  // namespace lockstep
