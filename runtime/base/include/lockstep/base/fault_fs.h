#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep {

/// What to do to one call: fail with `error_number` (0: do not fail), after `short_bytes` of a write arrived (torn), or
/// drop it silently. The default does nothing to it.
struct Fault {
  int error_number = 0;
  int64_t short_bytes = -1;  ///< >= 0: that many bytes of a write reach the file before the error
  bool drop = false;         ///< report success and do nothing (a lost unsynced write)
};

/// An Fs that counts calls and lets a test fail the k-th. Wraps a real one; ships with the library because users test
/// with it too.
class FaultFs : public Fs {
 public:
  /// @param real   what carries the operations out; must outlive this and every file opened through it.
  /// @param decide called before each operation, one at a time, with its kind ("open", "write", "read", "sync",
  /// "close",
  ///               "rename", "mkdir", "rmdir", "unlink", "allocate", "sync_directory", "list"), its path (for a rename
  ///               the new one) and the number of operations before it. exists(), size() and owner() change nothing and
  ///               are not asked.
  using Decide = std::function<Fault(const std::string& kind, const std::string& path, int64_t call)>;
  FaultFs(Fs& real, Decide decide);
  FaultFs(const FaultFs&) = delete;
  FaultFs& operator=(const FaultFs&) = delete;
  ~FaultFs() override;

  /// The next `looks` at `path` (opens and exists()) do not find it, as a name that another machine has made and this
  /// one does not know of yet; shows_late() is true from now on.
  void show_late(const std::string& path, int64_t looks);

  int64_t calls() const;                 ///< operations so far, the failed ones included
  std::vector<std::string> log() const;  ///< one line an operation: "kind path offset length"

  std::unique_ptr<File> create_exclusive(const std::string& path, int mode) override;
  std::unique_ptr<File> open_read(const std::string& path) override;
  std::unique_ptr<File> open_append(const std::string& path, int mode) override;
  void make_directory(const std::string& path, int mode) override;
  void sync_directory(const std::string& path) override;
  void rename_exclusive(const std::string& from, const std::string& to) override;
  void replace_file(const std::string& from, const std::string& to) override;
  void remove_file(const std::string& path) override;
  void remove_directory(const std::string& path) override;
  std::vector<std::string> list_directory(const std::string& path) override;
  bool exists(const std::string& path) override;
  bool shows_late(const std::string& path) override;
  std::unique_ptr<Folder> open_folder(const std::string& path) override;

  class State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace lockstep
