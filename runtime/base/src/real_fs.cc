#include <algorithm>
#include <cerrno>
#include <filesystem>

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {
namespace {

[[noreturn]] void fail(const std::string& doing, const std::string& path) { throw IoError(doing, path, errno); }

// Calls `call` again while a signal interrupts it.
template <typename Call>
auto uninterrupted(Call call) {
  decltype(call()) result;
  do {
    result = call();
  } while (result == -1 && errno == EINTR);
  return result;
}

class RealFile : public File {
 public:
  RealFile(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}

  void write_at(uint64_t offset, std::span<const std::byte> bytes) override {
    while (!bytes.empty()) {
      const ssize_t n =
          uninterrupted([&] { return ::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset)); });
      if (n < 0) fail("writing", path_);
      if (n == 0) throw IoError("writing", path_, EIO);  // a file system that takes nothing would keep us here for good
      bytes = bytes.subspan(static_cast<size_t>(n));
      offset += static_cast<uint64_t>(n);
    }
  }

  void read_at(uint64_t offset, std::span<std::byte> bytes) const override {
    while (!bytes.empty()) {
      const ssize_t n =
          uninterrupted([&] { return ::pread(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset)); });
      if (n < 0) fail("reading", path_);
      if (n == 0)
        throw CorruptData("'" + path_ + "' ends at byte " + std::to_string(offset) + ", " +
                          std::to_string(bytes.size()) + " bytes too early");
      bytes = bytes.subspan(static_cast<size_t>(n));
      offset += static_cast<uint64_t>(n);
    }
  }

  void allocate(uint64_t size_bytes) override {
    if (size_bytes == 0) return;
    // Not posix_fallocate(): where a file system cannot reserve, that one writes a byte to every block.
    if (uninterrupted([&] { return ::fallocate(fd_.get(), 0, 0, static_cast<off_t>(size_bytes)); }) == 0) return;
    if (errno != EOPNOTSUPP && errno != ENOSYS) fail("reserving " + std::to_string(size_bytes) + " bytes for", path_);
  }

  void sync() override {
    if (uninterrupted([&] { return ::fdatasync(fd_.get()); }) != 0) fail("syncing", path_);
  }

  void close() override {
    if (::close(fd_.release()) != 0) fail("closing", path_);  // not retried on EINTR: Linux has closed it by then
  }

  uint64_t size() const override {
    struct stat status {};
    if (::fstat(fd_.get(), &status) != 0) fail("sizing", path_);
    return static_cast<uint64_t>(status.st_size);
  }

 private:
  UniqueFd fd_;
  std::string path_;
};

std::unique_ptr<File> open_file(const std::string& path, int flags, int mode, const char* doing) {
  UniqueFd fd(uninterrupted([&] { return ::open(path.c_str(), flags | O_NOFOLLOW | O_CLOEXEC, mode); }));
  if (!fd) fail(doing, path);
  return std::make_unique<RealFile>(std::move(fd), path);
}

class RealFs : public Fs {
 public:
  std::unique_ptr<File> create_exclusive(const std::string& path, int mode) override {
    return open_file(path, O_RDWR | O_CREAT | O_EXCL, mode, "creating");
  }

  std::unique_ptr<File> open_read(const std::string& path) override {
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0) fail("opening", path);
    // Looked at before opening, because opening some devices does something; O_NONBLOCK, because the name may have
    // become a FIFO since, which would wait for its writer.
    if (!S_ISREG(status.st_mode)) throw IoError("opening something that is no regular file,", path, EINVAL);
    return open_file(path, O_RDONLY | O_NONBLOCK, 0, "opening");
  }

  std::unique_ptr<File> open_append(const std::string& path, int mode) override {
    return open_file(path, O_RDWR | O_CREAT, mode, "opening for append");
  }

  void make_directory(const std::string& path, int mode) override {
    if (::mkdir(path.c_str(), static_cast<mode_t>(mode)) != 0) fail("making directory", path);
  }

  void sync_directory(const std::string& path) override {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!fd) fail("opening directory", path);
    if (uninterrupted([&] { return ::fsync(fd.get()); }) != 0) fail("syncing directory", path);
  }

  void rename_exclusive(const std::string& from, const std::string& to) override {
    if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return;
    if (errno != EINVAL && errno != ENOSYS) fail("renaming to", to);
    if (::link(from.c_str(), to.c_str()) != 0)
      fail("linking to", to);  // file systems without NOREPLACE, NFS among them
    if (::unlink(from.c_str()) != 0) fail("unlinking", from);
  }

  void remove_file(const std::string& path) override {
    if (::unlink(path.c_str()) != 0 && errno != ENOENT) fail("removing", path);
  }

  void remove_directory(const std::string& path) override {
    if (::rmdir(path.c_str()) != 0 && errno != ENOENT) fail("removing directory", path);
  }

  std::vector<std::string> list_directory(const std::string& path) override {
    const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(path.c_str()), &::closedir);
    if (!directory) fail("listing", path);
    std::vector<std::string> names;
    errno = 0;
    while (const dirent* entry = ::readdir(directory.get())) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(name);
      errno = 0;
    }
    if (errno != 0) fail("listing", path);
    std::sort(names.begin(), names.end());
    return names;
  }

  bool exists(const std::string& path) override {
    struct stat status {};
    if (::lstat(path.c_str(), &status) == 0) return true;
    if (errno != ENOENT && errno != ENOTDIR) fail("looking for", path);
    return false;
  }
};

std::string parent_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

}  // namespace

Fs& real_fs() {
  static RealFs fs;
  return fs;
}

void make_directories(Fs& fs, const std::string& path, int mode) {
  const std::string clean = path.size() > 1 && path.ends_with('/') ? path.substr(0, path.size() - 1) : path;
  if (fs.exists(clean)) return;
  const std::string parent = parent_of(clean);
  if (parent != clean) make_directories(fs, parent, mode);
  try {
    fs.make_directory(clean, mode);
  } catch (const IoError& error) {
    if (error.error_number() != EEXIST) throw;  // another process was faster; its name may not be durable yet
  }
  fs.sync_directory(parent);
}

std::string read_text(Fs& fs, const std::string& path, uint64_t limit_bytes) {
  const auto file = fs.open_read(path);
  const uint64_t size = file->size();
  if (size > limit_bytes)
    throw CorruptData("'" + path + "' has " + std::to_string(size) + " bytes, more than the " +
                      std::to_string(limit_bytes) + " it may have");
  std::string text(size, '\0');
  file->read_at(0, std::as_writable_bytes(std::span(text.data(), text.size())));
  return text;
}

void write_durable(Fs& fs, const std::string& path, const std::string& text, int mode) {
  const auto file = fs.create_exclusive(path, mode);
  file->write_at(0, std::as_bytes(std::span(text.data(), text.size())));
  file->sync();
  file->close();
  fs.sync_directory(parent_of(path));
}

}  // namespace lockstep
