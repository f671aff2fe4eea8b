#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace lockstep {

/// An open file. Every call loops over EINTR and short transfers; every failure is an IoError with path and errno.
class File {
 public:
  virtual ~File() = default;  // an unclosed file is closed without a check: call close()
  virtual void write_at(uint64_t offset, std::span<const std::byte> bytes) = 0;
  /// Fills `bytes` completely. @throws CorruptData when the file ends before.
  virtual void read_at(uint64_t offset, std::span<std::byte> bytes) const = 0;
  /// fallocate: disk full shows here, before any byte is written; nothing on file systems that cannot reserve.
  virtual void allocate(uint64_t size_bytes) = 0;
  virtual void sync() = 0;   ///< fdatasync; after a failure the file is poisoned, never retried
  virtual void close() = 0;  ///< checks close()'s own error; later calls are a bug
  virtual uint64_t size() const = 0;
};

/// Every byte and name that must survive goes through this interface, so that tests can make any call fail (FaultFs).
/// Threads: all members may be called at once from several threads.
class Fs {
 public:
  virtual ~Fs() = default;
  virtual std::unique_ptr<File> create_exclusive(const std::string& path,
                                                 int mode = 0600) = 0;   ///< O_EXCL | O_NOFOLLOW
  virtual std::unique_ptr<File> open_read(const std::string& path) = 0;  ///< regular files only, O_NOFOLLOW
  virtual std::unique_ptr<File> open_append(const std::string& path, int mode = 0600) = 0;
  virtual void make_directory(const std::string& path, int mode = 0700) = 0;  ///< EEXIST is an error
  virtual void sync_directory(const std::string& path) = 0;
  /// Renames without replacing: fails with EEXIST when `to` is there (renameat2, or link + unlink where it lacks).
  virtual void rename_exclusive(const std::string& from, const std::string& to) = 0;
  virtual void remove_file(const std::string& path) = 0;                         ///< ENOENT is not an error
  virtual void remove_directory(const std::string& path) = 0;                    ///< empty ones only
  virtual std::vector<std::string> list_directory(const std::string& path) = 0;  ///< names, sorted, without . and ..
  virtual bool exists(const std::string& path) = 0;
};

/// The real thing. One for the whole process is enough.
Fs& real_fs();

/// Conveniences over any Fs.
void make_directories(Fs& fs, const std::string& path, int mode = 0700);  ///< like mkdir -p, each new parent fsynced
std::string read_text(Fs& fs, const std::string& path, uint64_t limit_bytes);  ///< @throws CorruptData over the limit
void write_durable(Fs& fs, const std::string& path, const std::string& text,
                   int mode = 0600);  ///< new file, fsynced; its folder too

}  // namespace lockstep
