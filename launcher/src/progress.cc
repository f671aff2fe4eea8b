#include <algorithm>
#include <iostream>

#include <unistd.h>

#include "verbs.h"

namespace lockstep::launcher {

std::string without_slash(const std::string& path) {
  const size_t last = path.find_last_not_of('/');
  return last == std::string::npos ? path.substr(0, 1) : path.substr(0, last + 1);
}

void show_progress(uint64_t done_bytes, uint64_t total_bytes) {
  static uint64_t shown = 0;
  if (!isatty(STDERR_FILENO) || (done_bytes - shown < (64 << 20) && done_bytes < total_bytes)) return;
  shown = done_bytes;
  std::cerr << "\r\033[K" << done_bytes * 100 / std::max<uint64_t>(total_bytes, 1) << " % read"
            << (done_bytes >= total_bytes ? "\r\033[K" : "") << std::flush;
}

}  // namespace lockstep::launcher
