#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <filesystem>

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
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

  uint64_t size() const override { return static_cast<uint64_t>(status().st_size); }
  uint32_t owner() const override { return status().st_uid; }

 private:
  struct stat status() const {
    struct stat status {};
    if (::fstat(fd_.get(), &status) != 0) fail("looking at", path_);
    return status;
  }

  UniqueFd fd_;
  std::string path_;
};

void check_regular(const struct stat& status, const std::string& path) {
  if (S_ISLNK(status.st_mode)) throw IoError("opening a link,", path, ELOOP);
  if (!S_ISREG(status.st_mode)) throw IoError("opening something that is no regular file,", path, EINVAL);
}

// Opens `name` of folder `at` for reading, never through a link in its last part. O_NONBLOCK: a FIFO would wait for
// its writer.
int open_in(int at, const std::string& name) {
  constexpr int kFlags = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC;
  if (at == AT_FDCWD) return ::openat(at, name.c_str(), kFlags);
  const open_how how{.flags = kFlags, .mode = 0, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
  const auto fd = static_cast<int>(::syscall(SYS_openat2, at, name.c_str(), &how, sizeof(how)));
  if (fd >= 0 || (errno != ENOSYS && errno != EPERM)) return fd;
  return ::openat(at, name.c_str(),
                  kFlags);  // before Linux 5.6, or in a sandbox; the name has one part, so it is enough
}

// Looked at before opening, because opening some devices does something, and after it, because the name may lead to
// something else by then.
std::unique_ptr<File> open_regular(int at, const std::string& name, const std::string& path) {
  struct stat status {};
  if (::fstatat(at, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) fail("opening", path);
  check_regular(status, path);
  UniqueFd fd(uninterrupted([&] { return open_in(at, name); }));
  if (!fd) fail("opening", path);
  if (::fstat(fd.get(), &status) != 0) fail("looking at", path);
  check_regular(status, path);
  return std::make_unique<RealFile>(std::move(fd), path);
}

class RealFolder : public Folder {
 public:
  RealFolder(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}

  std::unique_ptr<File> open_read(const std::string& name) override {
    const std::string path = path_ + "/" + name;
    if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos)
      throw IoError("opening what is no name in its folder,", path, EINVAL);
    return open_regular(fd_.get(), name, path);
  }

 private:
  UniqueFd fd_;
  std::string path_;
};

// Of file systems that have no folders to hold open.
class FolderByPath : public Folder {
 public:
  FolderByPath(Fs& fs, std::string path) : fs_(fs), path_(std::move(path)) {}
  std::unique_ptr<File> open_read(const std::string& name) override { return fs_.open_read(path_ + "/" + name); }

 private:
  Fs& fs_;
  std::string path_;
};

std::unique_ptr<File> open_file(const std::string& path, int flags, int mode, const char* doing) {
  UniqueFd fd(uninterrupted([&] { return ::open(path.c_str(), flags | O_NOFOLLOW | O_CLOEXEC, mode); }));
  if (!fd) fail(doing, path);
  return std::make_unique<RealFile>(std::move(fd), path);
}

std::string parent_of(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

// By what statfs(2) calls the type; most are in no header.
bool is_network(uint32_t type) {
  constexpr std::array<uint32_t, 18> kNetwork = {
      0x6969,      // NFS
      0x517B,      // SMB
      0xFE534D42,  // SMB2
      0xFF534D42,  // CIFS
      0x00C36400,  // Ceph
      0x0BD00BD0,  // Lustre
      0x65735546,  // FUSE: GlusterFS, sshfs, ...
      0x47504653,  // GPFS
      0x19830326,  // BeeGFS
      0x01021997,  // 9p
      0x5346414F,  // AFS
      0x6B414653,  // AFS of the kernel
      0x73757245,  // Coda
      0x20030528,  // OrangeFS
      0xAAD7AAEA,  // PanFS
      0x01161970,  // GFS2
      0x7461636F,  // OCFS2
      0x786F4256,  // VirtualBox's shared folders
  };
  return std::find(kNetwork.begin(), kNetwork.end(), type) != kNetwork.end();
}

class RealFs : public Fs {
 public:
  std::unique_ptr<File> create_exclusive(const std::string& path, int mode) override {
    return open_file(path, O_RDWR | O_CREAT | O_EXCL, mode, "creating");
  }

  std::unique_ptr<File> open_read(const std::string& path) override { return open_regular(AT_FDCWD, path, path); }

  std::unique_ptr<Folder> open_folder(const std::string& path) override {
    UniqueFd fd(uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
    if (!fd) fail("opening directory", path);
    return std::make_unique<RealFolder>(std::move(fd), path);
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
    // File systems without NOREPLACE: NFS, Lustre, 9p, many by FUSE.
    struct stat status {};
    if (::lstat(from.c_str(), &status) != 0) fail("renaming", from);
    if (S_ISDIR(status.st_mode)) return rename_folder(from, to);
    if (::link(from.c_str(), to.c_str()) != 0) fail("linking to", to);
    if (::unlink(from.c_str()) != 0) fail("unlinking", from);
  }

  void replace_file(const std::string& from, const std::string& to) override {
    if (::rename(from.c_str(), to.c_str()) != 0) fail("replacing", to);
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

  bool shows_late(const std::string& path) override {
    struct statfs status {};
    for (std::string place = path; ::statfs(place.c_str(), &status) != 0; place = parent_of(place)) {
      if (place == "." || place == "/") return false;
    }
    return is_network(static_cast<uint32_t>(status.f_type));
  }

 private:
  // A folder cannot be linked. If one comes between the look and the renaming, the latter replaces an empty one at
  // most.
  void rename_folder(const std::string& from, const std::string& to) {
    if (exists(to)) throw IoError("renaming to", to, EEXIST);
    if (::rename(from.c_str(), to.c_str()) != 0) fail("renaming to", to);
  }
};

}  // namespace

uint32_t File::owner() const { return ::geteuid(); }

bool Fs::shows_late(const std::string&) { return false; }

std::unique_ptr<Folder> Fs::open_folder(const std::string& path) { return std::make_unique<FolderByPath>(*this, path); }

void share_new_files(Share share) { ::umask(share == Share::kGroup ? 0027 : 0077); }

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

std::string read_all(const File& file, const std::string& path, uint64_t limit_bytes) {
  const uint64_t size = file.size();
  if (size > limit_bytes)
    throw CorruptData("'" + path + "' has " + std::to_string(size) + " bytes, more than the " +
                      std::to_string(limit_bytes) + " it may have");
  std::string text(size, '\0');
  file.read_at(0, std::as_writable_bytes(std::span(text.data(), text.size())));
  return text;
}

std::string read_text(Fs& fs, const std::string& path, uint64_t limit_bytes) {
  return read_all(*fs.open_read(path), path, limit_bytes);
}

void write_durable(Fs& fs, const std::string& path, const std::string& text, int mode) {
  const auto file = fs.create_exclusive(path, mode);
  file->write_at(0, std::as_bytes(std::span(text.data(), text.size())));
  file->sync();
  file->close();
  fs.sync_directory(parent_of(path));
}

}  // namespace lockstep
