#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include <lockstep/base/unique_handle.h>

namespace lockstep::test {

/// From now on what this process mounts is seen by nobody else and goes with it (not in a chroot). False, with errno,
/// where that is not allowed.
bool hide_mounts();

/// A small disk in memory with a real ext4 on it, whose power can be cut: a memfd behind a loop device, mounted.
/// Needs root and loop devices; everything goes with the object, at the latest with the process.
class LoopDisk {
 public:
  /// Empty when this machine can have one, else why it cannot.
  static std::string why_not();

  /// A fresh file system of `bytes`, or one with the content that image() had.
  explicit LoopDisk(size_t bytes);
  explicit LoopDisk(const std::vector<std::byte>& image);
  ~LoopDisk();
  LoopDisk(const LoopDisk&) = delete;
  LoopDisk& operator=(const LoopDisk&) = delete;

  void mount(const std::string& directory, const char* options = "");
  void unmount();  ///< no file on it may be open
  /// What was not synced is lost, and every later call on the mounted file system fails.
  void cut_power();
  std::vector<std::byte> image() const;  ///< while it is not mounted

 private:
  void attach();

  UniqueFd memory_, device_;
  std::string device_path_, mounted_at_;
};

}  // namespace lockstep::test
