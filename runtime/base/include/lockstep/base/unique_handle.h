#pragma once

#include <utility>

#include <unistd.h>

namespace lockstep {

/// One owner for one C handle. Traits: `Handle`, `null()`, `close(Handle) noexcept`.
template <typename Traits>
class UniqueHandle {  // moves, never copies
 public:
  using Handle = typename Traits::Handle;
  explicit UniqueHandle(Handle handle = Traits::null()) noexcept : handle_(handle) {}
  UniqueHandle(UniqueHandle&& other) noexcept : handle_(other.release()) {}
  UniqueHandle& operator=(UniqueHandle&& other) noexcept {
    reset(other.release());  // closes what this held; a plain exchange would leak it
    return *this;
  }
  UniqueHandle(const UniqueHandle&) = delete;
  UniqueHandle& operator=(const UniqueHandle&) = delete;
  ~UniqueHandle() { reset(); }

  Handle get() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return handle_ != Traits::null(); }
  Handle release() noexcept { return std::exchange(handle_, Traits::null()); }
  void reset(Handle handle = Traits::null()) noexcept {
    if (Handle old = std::exchange(handle_, handle); old != Traits::null()) Traits::close(old);
  }

 private:
  Handle handle_;  // null() is a call because MPI_COMM_NULL is no constant expression in Open MPI
};

struct FdTraits {
  using Handle = int;
  static int null() noexcept { return -1; }
  static void close(int fd) noexcept { ::close(fd); }
};
/// A file descriptor. Closing by destructor drops close()'s error: writers close through Fs, which checks it.
using UniqueFd = UniqueHandle<FdTraits>;

}  // namespace lockstep
