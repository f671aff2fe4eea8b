#pragma once

/// The one logging header. c10 is told by C10_USE_GLOG, defined on every target, to use glog's macros too, so that a
/// LOG after a torch header still arrives (facts: both libraries define LOG, CHECK and VLOG). glog's upstream is
/// archived: a successor with the same API (ng-log) would be a change of this line alone.
#include <string>

#include <glog/logging.h>

namespace lockstep {

/// Starts logging to stderr; with `log_dir`, a folder that is there, also to <program>.rank<r>.<time>.<pid> in it, mode
/// 0640 less the umask (share_new_files()). A line reads "W 14:03:07.120 [rank 3/8] trainer.cc:41] text". From main,
/// before other threads log; a second call gives the folder when it is there only later.
void start_logging(const char* program, int rank, int world_size, const std::string& log_dir = "");

}  // namespace lockstep
