#pragma once

#include <string>

namespace lockstep {

/// Starts the node's agent, `lockstep agent`, in a session of its own: what LOCKSTEP_AGENT names, else the `lockstep`
/// beside this program or on PATH; LOCKSTEP_AGENT=none starts none.
/// @return its pid, which ends at once after it has put the agent into the background; -1: there is none, after a
/// warning where that was not asked for.
int start_agent(const std::string& job_key, int local_size);

}  // namespace lockstep
