#pragma once

#include <chrono>

namespace lockstep::launcher {

/// TERM, INT, HUP and USR1 to this process are requests to stop from now on, and are counted. PIPE is ignored:
/// `lockstep run … | head` must not end the training.
void install_stop_signals();

int stop_requests();
/// A person said it again (Ctrl-C twice): Slurm sends USR1, then TERM, and that is no hurry.
bool stop_is_urgent();
/// Sleeps. @return false as soon as a request to stop is there.
bool wait_unless_stopped(std::chrono::milliseconds time);

}  // namespace lockstep::launcher
