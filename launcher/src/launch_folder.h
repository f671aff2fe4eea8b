#pragma once

#include <chrono>
#include <string>
#include <vector>

#include <sys/types.h>

#include <lockstep/base/launch_records.h>

namespace lockstep::launcher {

/// The places of one start: the folder of its records, and where Open MPI may keep its files on this machine. All are
/// named after this process, so that a later launcher can tell what a dead one left, and are removed with the object.
///
/// Folders are called lockstep-HOST.PID.STARTED.NAMESPACE.XXXXXX. PID and STARTED (clock ticks since boot) name a
/// process for good; processes of another host or PID namespace (a container that shares /dev/shm) are not judged.
class LaunchFolder {
 public:
  /// @param run_dir of the program; records lie in run_dir/launch, which is made. Empty, or not to be written: they lie
  /// in the temporary folder of this machine. @throws ConfigError when that cannot be written either.
  explicit LaunchFolder(const std::string& run_dir);
  LaunchFolder(const LaunchFolder&) = delete;
  LaunchFolder& operator=(const LaunchFolder&) = delete;
  /// Removes everything that this start and Open MPI left; in run_dir only records, and folders that are empty then.
  ~LaunchFolder();

  LaunchRecords records() const { return LaunchRecords(records_); }
  const std::string& session() const { return session_; }              ///< for Open MPI's session directories
  const std::string& shared_memory() const { return shared_memory_; }  ///< for its segments

 private:
  std::string run_dir_, records_, session_, shared_memory_;
  bool made_run_dir_ = false;
};

/// This process in a file's words, and whether such words are of one that is gone from this machine. Of other hosts and
/// PID namespaces nobody here knows: false.
std::string launcher_name();
bool is_dead_launcher(const std::string& name);
bool is_launcher_here(const std::string& name);  ///< of this host and PID namespace, dead or alive

/// Ends the processes that belong to starts of launchers that are gone, on this machine and of this user, and removes
/// what they left in run_dir/launch, the temporary folder and /dev/shm. @return a line for each thing found.
std::vector<std::string> sweep_dead_launches(const std::string& run_dir);

/// Ends every process of this user that was started with LOCKSTEP_LAUNCH_DIR=`records`, whatever has become of its
/// parents. @return those that could not be ended in `limit`: they wait for a device or a disk that is gone.
std::vector<pid_t> end_processes_of(const std::string& records, std::chrono::milliseconds limit);

}  // namespace lockstep::launcher
