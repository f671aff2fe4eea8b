#include "loop_disk.h"

#include <cerrno>
#include <utility>

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <lockstep/base/error.h>

namespace lockstep::test {
namespace {

// linux/ext4.h is new: EXT4_IOC_SHUTDOWN and its flag for "not even the journal is flushed".
constexpr unsigned long kShutDown = _IOR('X', 125, uint32_t);
constexpr uint32_t kWithoutFlush = 2;

void require(bool ok, const char* doing, const std::string& path) {
  if (!ok) throw IoError(doing, path, errno);
}

void make_file_system(const std::string& path) {
  std::vector<std::string> words = {
      "mkfs.ext4", "-q", "-F", "-b", "1024", "-E", "lazy_itable_init=0,lazy_journal_init=0", path};
  std::vector<char*> arguments;
  arguments.reserve(words.size() + 1);
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  pid_t child = 0;
  errno = posix_spawnp(&child, arguments[0], nullptr, nullptr, arguments.data(), environ);
  require(errno == 0, "starting", "mkfs.ext4");
  int status = 0;
  require(waitpid(child, &status, 0) == child, "waiting for", "mkfs.ext4");
  if (status != 0) throw IoError("mkfs.ext4 of", path, EIO);
}

}  // namespace

bool hide_mounts() {
  static const bool done = unshare(CLONE_NEWNS) == 0;
  if (done) ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);  // fails in a chroot, where they are seen
  return done;
}

std::string LoopDisk::why_not() {
  if (geteuid() != 0) return "mounting needs root";
  try {
    LoopDisk disk(size_t{4} << 20);
  } catch (const IoError& error) {
    return std::string("no loop device: ") + error.what();
  }
  return "";
}

LoopDisk::LoopDisk(size_t bytes) : memory_(memfd_create("loop_disk", MFD_CLOEXEC)) {
  require(memory_ && ftruncate(memory_.get(), static_cast<off_t>(bytes)) == 0, "making", "a disk in memory");
  make_file_system("/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(memory_.get()));
  attach();
}

LoopDisk::LoopDisk(const std::vector<std::byte>& image) : memory_(memfd_create("loop_disk", MFD_CLOEXEC)) {
  const auto bytes = static_cast<ssize_t>(image.size());
  require(memory_ && pwrite(memory_.get(), image.data(), image.size(), 0) == bytes, "making", "a disk in memory");
  attach();
}

LoopDisk::~LoopDisk() {
  if (!mounted_at_.empty()) ::umount2(mounted_at_.c_str(), MNT_DETACH);
}

void LoopDisk::attach() {
  require(hide_mounts(), "unsharing", "mounts");
  const UniqueFd control(open("/dev/loop-control", O_RDWR | O_CLOEXEC));
  require(bool(control), "opening", "/dev/loop-control");
  loop_config config{};
  config.fd = static_cast<uint32_t>(memory_.get());
  config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
  for (int tries = 0;; ++tries) {  // another process may be as fast
    const int number = ioctl(control.get(), LOOP_CTL_GET_FREE);
    device_path_ = "/dev/loop" + std::to_string(number);
    device_.reset(number < 0 ? -1 : open(device_path_.c_str(), O_RDWR | O_CLOEXEC));
    if (device_ && ioctl(device_.get(), LOOP_CONFIGURE, &config) == 0) return;
    require(errno == EBUSY && tries < 100, "attaching", device_path_);
  }
}

void LoopDisk::mount(const std::string& directory, const char* options) {
  require(::mount(device_path_.c_str(), directory.c_str(), "ext4", MS_NOATIME, options) == 0, "mounting", device_path_);
  mounted_at_ = directory;
}

void LoopDisk::unmount() {
  require(::umount2(mounted_at_.c_str(), 0) == 0, "unmounting", mounted_at_);
  // The kernel's copy of the disk may hold what never reached it.
  require(ioctl(device_.get(), BLKFLSBUF) == 0, "emptying the buffers of", device_path_);
  mounted_at_.clear();
}

void LoopDisk::cut_power() {
  const UniqueFd root(open(mounted_at_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  uint32_t how = kWithoutFlush;
  require(root && ioctl(root.get(), kShutDown, &how) == 0, "cutting the power of", mounted_at_);
}

std::vector<std::byte> LoopDisk::image() const {
  std::vector<std::byte> bytes(static_cast<size_t>(lseek(memory_.get(), 0, SEEK_END)));
  const auto wanted = static_cast<ssize_t>(bytes.size());
  require(pread(memory_.get(), bytes.data(), bytes.size(), 0) == wanted, "reading", device_path_);
  return bytes;
}

}  // namespace lockstep::test
