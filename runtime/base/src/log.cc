#include <cstdio>
#include <string>

#include <lockstep/base/log.h>

namespace lockstep {
namespace {

std::string g_rank_tag;  // set once, before threads start; glog's prefix callback has no argument but a plain pointer

void write_prefix(std::ostream& out, const google::LogMessageInfo& info, void* tag) {
  char time[32];
  std::snprintf(time, sizeof(time), "%02d:%02d:%02d.%03d", info.time.hour(), info.time.min(), info.time.sec(),
                static_cast<int>(info.time.usec() / 1000));
  out << info.severity[0] << ' ' << time << ' ' << *static_cast<std::string*>(tag) << info.filename << ':'
      << info.line_number << ']';
}

// One file a rank: glog's own way is a file for each severity, and links that the ranks of a node would fight over.
void log_to_file(const std::string& program, int rank, const std::string& log_dir) {
  const std::string name = program.substr(program.rfind('/') + 1);
  const std::string prefix = log_dir + "/" + name + ".rank" + std::to_string(rank) + ".";
  for (int severity = google::GLOG_INFO; severity < google::NUM_SEVERITIES; ++severity) {
    google::SetLogDestination(severity, severity == google::GLOG_INFO ? prefix.c_str() : "");
    google::SetLogSymlink(severity, "");
  }
}

}  // namespace

void start_logging(const char* program, int rank, int world_size, const std::string& log_dir) {
  g_rank_tag = "[rank " + std::to_string(rank) + "/" + std::to_string(world_size) + "] ";
  FLAGS_logtostderr = log_dir.empty();
  FLAGS_stderrthreshold = 0;
  FLAGS_logbuflevel = -1;                  // what a rank said last is what one wants to read after it was killed
  FLAGS_logfile_mode = 0640;               // less the umask; glog's default lets every user of the node read
  FLAGS_stop_logging_if_full_disk = true;  // a full log disk must not end training
  FLAGS_max_log_size = 256;                // MB
  if (!log_dir.empty()) log_to_file(program, rank, log_dir);
  static bool started = false;  // glog aborts on a second InitGoogleLogging
  if (started) return;
  started = true;
  google::InitGoogleLogging(program, &write_prefix, &g_rank_tag);
}

}  // namespace lockstep
