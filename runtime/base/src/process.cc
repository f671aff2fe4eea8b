#include <charconv>
#include <string_view>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <lockstep/base/process.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {
namespace {

std::string read_small(const std::string& path) {
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return {};
  std::string text(1024, '\0');
  const ssize_t got = ::read(file.get(), text.data(), text.size());
  text.resize(got > 0 ? static_cast<size_t>(got) : 0);
  return text;
}

}  // namespace

std::optional<ProcessStat> read_stat(pid_t pid) {
  const std::string text = read_small("/proc/" + std::to_string(pid) + "/stat");
  // The name, field 2, is whatever the process calls itself: fields are counted from its last parenthesis.
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos || name_end + 2 >= text.size()) return std::nullopt;
  ProcessStat stat{.state = text[name_end + 2]};
  size_t at = name_end + 2;
  for (int field = 3; field < 22; ++field) {
    at = text.find(' ', at);
    if (at == std::string::npos) return std::nullopt;
    ++at;
  }
  if (std::from_chars(text.data() + at, text.data() + text.size(), stat.start_time).ec != std::errc())
    return std::nullopt;
  return stat;
}

std::string start_time_of(pid_t pid) {
  const auto stat = read_stat(pid);
  return !stat || stat->state == 'Z' || stat->state == 'X' ? "" : std::to_string(stat->start_time);
}

std::string read_wchan(pid_t pid) {
  std::string name = read_small("/proc/" + std::to_string(pid) + "/wchan");
  return name == "0" ? std::string() : name.substr(0, 64);
}

uint64_t pid_namespace() {
  struct stat found {};
  return ::stat("/proc/self/ns/pid", &found) == 0 ? found.st_ino : 0;
}

void forbid_core_dumps() {
  const rlimit none{0, 0};
  ::setrlimit(RLIMIT_CORE, &none);  // lowering never fails
}

std::string core_pattern() {
  const std::string text = read_small("/proc/sys/kernel/core_pattern");
  return text.substr(0, text.find('\n'));
}

}  // namespace lockstep
