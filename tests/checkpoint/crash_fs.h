#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep {

/// A file system in memory that knows what a power loss may leave of it, by the letter of POSIX: of a file what was in
/// it at its last sync, with any part of the later writes; of a directory its entries at its last sync, with any subset
/// of the later changes. Ext4 keeps more; a program that survives here survives there.
/// Source: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
class CrashFs : public Fs {
 public:
  struct Inode {
    bool is_directory = false;
    std::string content, durable_content;
    /// One change of a directory: the names it adds, and those it takes away (a null inode). A rename does both at
    /// once.
    using Change = std::vector<std::pair<std::string, std::shared_ptr<Inode>>>;
    std::map<std::string, std::shared_ptr<Inode>> entries, durable_entries;
    std::vector<Change> pending;
  };

  CrashFs();
  /// Called before every operation that changes something, one at a time.
  void watch(std::function<void()> before_change) { before_change_ = std::move(before_change); }

  /// What may be found after a power loss now, everything in it durable. `keep`: chance that an unsynced change is
  /// kept.
  std::unique_ptr<CrashFs> after_power_loss(std::mt19937& random, double keep) const;
  /// A copy of all, synced and not.
  std::unique_ptr<CrashFs> copy() const;

  std::unique_ptr<File> create_exclusive(const std::string& path, int mode) override;
  std::unique_ptr<File> open_read(const std::string& path) override;
  std::unique_ptr<File> open_append(const std::string& path, int mode) override;
  void make_directory(const std::string& path, int mode) override;
  void sync_directory(const std::string& path) override;
  void rename_exclusive(const std::string& from, const std::string& to) override;
  void remove_file(const std::string& path) override;
  void remove_directory(const std::string& path) override;
  std::vector<std::string> list_directory(const std::string& path) override;
  bool exists(const std::string& path) override;

 private:
  friend class CrashFile;
  std::shared_ptr<Inode> find(const std::string& path) const;
  std::shared_ptr<Inode> parent(const std::string& path, std::string& name) const;
  void change(const std::shared_ptr<Inode>& directory, const Inode::Change& change);
  void before_change();

  mutable std::recursive_mutex mutex_;
  std::shared_ptr<Inode> root_;
  std::function<void()> before_change_;
};

}  // namespace lockstep
