#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep {

/// A file system in memory that logs every operation and rebuilds what a power loss may leave after any of them, by the
/// letter of POSIX: a file's sync makes its bytes durable, not its name; a folder's sync its names, not their bytes.
/// What was not synced may be lost in any combination. Ext4 keeps more; a program that survives here survives there.
/// Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
class CrashFs : public Fs {
 public:
  static constexpr size_t kNever = SIZE_MAX;

  /// One operation of the log. Files and folders are numbered; 0 is the root.
  struct Operation {
    enum class Kind { kWrite, kResize, kNames, kSync };
    Kind kind = Kind::kSync;
    size_t inode = 0;     ///< what it changes or syncs
    uint64_t offset = 0;  ///< kWrite: where; kResize: the new size
    std::string bytes = {};
    /// kNames: where names of the folder lead from now on, nowhere where removed. A rename changes two at once.
    std::vector<std::pair<std::string, std::optional<size_t>>> names = {};
    size_t synced_by = kNever;  ///< the operation that made it durable
  };

  /// A part that never reached the disk: bytes [begin, end) of a write, else the whole operation.
  struct Loss {
    size_t operation = 0;
    size_t begin = 0, end = kNever;
    friend bool operator<(const Loss& a, const Loss& b) { return a.operation < b.operation; }
  };

  CrashFs();

  size_t num_operations() const;
  const Operation& operation(size_t number) const { return log_[number]; }  ///< not while others write
  /// Those of the first `prefix` operations that a power loss right after them may lose.
  std::vector<size_t> unsynced(size_t prefix) const;
  /// What is there after the first `prefix` operations, `losses` (in order of operation) and a restart.
  std::unique_ptr<CrashFs> after_power_loss(size_t prefix, const std::vector<Loss>& losses) const;
  /// Names all that can be reached: equal trees have equal digests.
  std::string digest() const;

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

 private:
  friend class CrashFile;
  struct Inode {
    bool is_directory = false;
    std::string content = {};
    std::map<std::string, size_t> names = {};
  };
  void record(Operation operation);
  void apply(const Operation& operation, const Loss* losses, size_t num_losses);
  size_t make_inode(bool is_directory);
  std::optional<size_t> find(const std::string& path) const;
  size_t parent(const std::string& path, std::string& name) const;

  mutable std::recursive_mutex mutex_;
  std::deque<Inode> inodes_;  // open files refer to them
  std::vector<Operation> log_;
};

}  // namespace lockstep
