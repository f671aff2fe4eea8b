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
  virtual uint32_t owner() const;  ///< user id; ours unless the file system says otherwise
};

/// A folder held open: names are looked up in it and nowhere else, whatever becomes of the path it was found by.
class Folder {
 public:
  virtual ~Folder() = default;
  /// Opens a regular file of this very folder. @throws IoError for a name of more than one part ("a/b", ".."), a link
  /// (ELOOP), anything that is no regular file (EINVAL): before and after opening, so that an exchange is found.
  virtual std::unique_ptr<File> open_read(const std::string& name) = 0;
};

/// Every byte and name that must survive goes through this interface, so that tests can make any call fail (FaultFs).
/// Threads: all members may be called at once from several threads.
class Fs {
 public:
  virtual ~Fs() = default;
  virtual std::unique_ptr<File> create_exclusive(const std::string& path,
                                                 int mode = 0640) = 0;   ///< O_EXCL | O_NOFOLLOW
  virtual std::unique_ptr<File> open_read(const std::string& path) = 0;  ///< regular files only, O_NOFOLLOW
  virtual std::unique_ptr<File> open_append(const std::string& path, int mode = 0640) = 0;
  virtual void make_directory(const std::string& path, int mode = 0750) = 0;  ///< EEXIST is an error
  virtual void sync_directory(const std::string& path) = 0;
  /// Renames without replacing: fails with EEXIST when `to` is there (renameat2; where it lacks, link + unlink for a
  /// file, a look + rename for a folder).
  virtual void rename_exclusive(const std::string& from, const std::string& to) = 0;
  /// Renames over what is at `to`, if anything is, in one step: who looks sees the one or the other.
  virtual void replace_file(const std::string& from, const std::string& to) = 0;
  virtual void remove_file(const std::string& path) = 0;                         ///< ENOENT is not an error
  virtual void remove_directory(const std::string& path) = 0;                    ///< empty ones only
  virtual std::vector<std::string> list_directory(const std::string& path) = 0;  ///< names, sorted, without . and ..
  virtual bool exists(const std::string& path) = 0;
  /// Whether a name that another machine has made may be seen here only after a while, as clients of network file
  /// systems keep what they know of names for up to a minute. Asked of the nearest folder that is there.
  virtual bool shows_late(const std::string& path);
  /// Links on the way to the folder are followed: a person named it. For file systems of tests the default looks
  /// names up by path.
  virtual std::unique_ptr<Folder> open_folder(const std::string& path);
};

/// Who may read what this process and its children create from now on: nobody else, or the group too. Sets the umask;
/// modes asked for below are upper bounds.
enum class Share { kNone, kGroup };
void share_new_files(Share share);

/// The real thing. One for the whole process is enough.
Fs& real_fs();

/// Conveniences over any Fs.
void make_directories(Fs& fs, const std::string& path, int mode = 0750);  ///< like mkdir -p, each new parent fsynced
std::string read_text(Fs& fs, const std::string& path, uint64_t limit_bytes);  ///< @throws CorruptData over the limit
std::string read_all(const File& file, const std::string& path, uint64_t limit_bytes);  ///< the same; the path is shown
void write_durable(Fs& fs, const std::string& path, const std::string& text,
                   int mode = 0640);  ///< new file, fsynced; its folder too

}  // namespace lockstep
