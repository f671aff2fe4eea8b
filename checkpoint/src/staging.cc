#include "staging.h"

#include <cerrno>
#include <cstring>
#include <string>

#include <sys/mman.h>

#include <lockstep/base/error.h>

namespace lockstep::checkpoint {

Staging::~Staging() { free(); }

void Staging::free() noexcept {
  if (!memory_.empty()) ::munmap(memory_.data(), memory_.size());
  memory_ = {};
}

std::span<std::byte> Staging::reserve(size_t bytes) {
  if (bytes <= memory_.size()) return memory_.first(bytes);
  free();
  void* start = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) {
    throw ConfigError("no memory for the copy of " + std::to_string(bytes) +
                      " bytes that a checkpoint is written from: " + std::strerror(errno) +
                      ". Mend: --asynchronous_save=false writes from the tensors themselves");
  }
  memory_ = {static_cast<std::byte*>(start), bytes};
  ::madvise(start, bytes, MADV_HUGEPAGE);  // a wish, as the next: a kernel without them is only slower
  ::madvise(start, bytes, MADV_POPULATE_WRITE);
  return memory_;
}

}  // namespace lockstep::checkpoint
