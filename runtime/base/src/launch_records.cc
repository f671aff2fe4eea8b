#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string_view>

#include <fcntl.h>
#include <unistd.h>

#include <execinfo.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/base/launch_records.h>
#include <lockstep/base/log.h>

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kMaxRecordBytes = 1 << 16;
constexpr size_t kMaxMessageBytes = 8 << 10;
constexpr std::string_view kFailure = "failure.";
constexpr std::array kCrashes = {SIGSEGV, SIGBUS, SIGFPE, SIGABRT};

std::atomic<int64_t> g_step{-1};

std::string host_name() {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  return name.data();
}

std::optional<int> number_after(std::string_view name, std::string_view prefix) {
  int value = 0;
  const char* end = name.data() + name.size();
  if (!name.starts_with(prefix)) return std::nullopt;
  const auto parsed = std::from_chars(name.data() + prefix.size(), end, value);
  return parsed.ec == std::errc() && parsed.ptr == end && value >= 0 ? std::optional(value) : std::nullopt;
}

Json read_record(const std::string& path) {
  try {
    if (!real_fs().exists(path)) return nullptr;
    return Json::parse(read_text(real_fs(), path, kMaxRecordBytes), nullptr, /*allow_exceptions=*/false);
  } catch (const Error& error) {  // it went away meanwhile, or is no file
    return nullptr;
  }
}

// All a signal handler needs, made beforehand: it may call neither malloc nor anything that locks.
struct Crash {
  std::array<char, 4096> aside{}, path{};
  std::array<char, 512> host{}, who{};
};
Crash g_crash;
alignas(16) std::array<char, 64 << 10> g_crash_stack;  // a stack that overflowed has no room for a handler

class Text {  // a line put together without malloc
 public:
  Text& operator<<(std::string_view text) {
    const size_t count = std::min(text.size(), bytes_.size() - size_);
    std::memcpy(bytes_.data() + size_, text.data(), count);
    size_ += count;
    return *this;
  }
  Text& operator<<(int64_t number) {
    std::array<char, 24> digits{};
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
    return *this << std::string_view(digits.data(), static_cast<size_t>(end - digits.data()));
  }
  void write_to(int fd) const {
    for (size_t done = 0; done < size_;) {
      const ssize_t written = ::write(fd, bytes_.data() + done, size_ - done);
      if (written < 0 && errno != EINTR) return;
      done += static_cast<size_t>(std::max<ssize_t>(written, 0));
    }
  }

 private:
  std::array<char, 1024> bytes_{};
  size_t size_ = 0;
};

std::string_view crash_name(int signal) {  // strsignal may lock
  switch (signal) {
    case SIGSEGV:
      return "Segmentation fault";
    case SIGBUS:
      return "Bus error";
    case SIGFPE:
      return "Floating point exception";
    default:
      return "Aborted";
  }
}

void write_crash_record(int signal) {
  const int fd = ::open(g_crash.aside.data(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
  if (fd < 0) return;
  Text text;
  text << "{\"exit_code\":" << static_cast<int>(ExitCode::kBug) << ",\"signal\":" << signal
       << ",\"message\":\"died by signal " << signal << " (" << crash_name(signal) << ")\",\"host\":\""
       << g_crash.host.data() << "\"";
  if (const int64_t step = g_step.load(std::memory_order_relaxed); step >= 0) text << ",\"step\":" << step;
  text << "}\n";
  text.write_to(fd);
  ::close(fd);
  ::rename(g_crash.aside.data(), g_crash.path.data());
}

void on_crash(int signal) {
  static std::atomic_flag is_first = ATOMIC_FLAG_INIT;  // several threads may crash at once
  if (!is_first.test_and_set()) {
    if (g_crash.path[0] != 0) write_crash_record(signal);
    Text line;
    line << "\n"
         << g_crash.who.data() << "died by signal " << signal << " (" << crash_name(signal) << "); its stack:\n";
    line.write_to(STDERR_FILENO);
    std::array<void*, 64> frames{};
    ::backtrace_symbols_fd(frames.data(), ::backtrace(frames.data(), frames.size()), STDERR_FILENO);
  }
  std::signal(signal, SIG_DFL);
  ::raise(signal);  // pending until this handler returns
}

bool copy_text(const std::string& text, std::span<char> target) {
  if (text.size() >= target.size()) return false;
  std::memcpy(target.data(), text.c_str(), text.size() + 1);
  return true;
}

}  // namespace

void note_step(int64_t step) noexcept { g_step.store(step, std::memory_order_relaxed); }

LaunchRecords LaunchRecords::from_environment(const Environment& environment) {
  return LaunchRecords(environment("LOCKSTEP_LAUNCH_DIR").value_or(""));
}

void LaunchRecords::write(const std::string& name, const std::string& text) const {
  if (folder_.empty()) return;
  const std::string path = folder_ + "/" + name, aside = path + "." + std::to_string(::getpid()) + ".tmp";
  try {
    const auto file = real_fs().create_exclusive(aside, 0600);
    file->write_at(0, std::as_bytes(std::span(text.data(), text.size())));
    file->close();
    real_fs().replace_file(aside, path);
  } catch (const IoError& error) {
    LOG(WARNING) << error.what() << ": the launcher will not know that this rank is '" << name << "'";
  }
}

void LaunchRecords::say_failed(int rank, int exit_code, const std::string& message) const {
  const std::string name = std::string(kFailure) + std::to_string(rank);
  if (folder_.empty() || real_fs().exists(folder_ + "/" + name)) return;
  Json json = {{"exit_code", exit_code}, {"message", message.substr(0, kMaxMessageBytes)}, {"host", host_name()}};
  if (const int64_t step = g_step; step >= 0) json["step"] = step;
  write(name, json.dump(-1, ' ', false, Json::error_handler_t::replace));
}

void LaunchRecords::record_crashes(int rank, int world_size) const {
  const std::string path = folder_ + "/" + std::string(kFailure) + std::to_string(rank);
  if (!folder_.empty() && copy_text(path + "." + std::to_string(::getpid()) + ".crash.tmp", g_crash.aside))
    copy_text(path, g_crash.path);
  copy_text(Json(host_name()).dump(-1, ' ', true, Json::error_handler_t::replace).substr(1), g_crash.host);
  if (const size_t length = std::strlen(g_crash.host.data()); length > 0) g_crash.host[length - 1] = 0;  // the quote
  copy_text("[rank " + std::to_string(rank) + "/" + std::to_string(world_size) + "] ", g_crash.who);
  std::array<void*, 1> frame{};
  ::backtrace(frame.data(), 1);  // loads libgcc now: a handler must not
  const stack_t stack{g_crash_stack.data(), 0, g_crash_stack.size()};
  ::sigaltstack(&stack, nullptr);
  for (const int signal : kCrashes) {
    struct sigaction action {};
    if (::sigaction(signal, nullptr, &action) != 0 || action.sa_handler != SIG_DFL) continue;
    action.sa_handler = &on_crash;
    action.sa_flags = SA_ONSTACK;
    ::sigaction(signal, &action, nullptr);
  }
}

bool LaunchRecords::is_ready() const { return !folder_.empty() && real_fs().exists(folder_ + "/ready"); }

std::optional<int> LaunchRecords::done() const {
  if (folder_.empty()) return std::nullopt;
  const Json json = read_record(folder_ + "/done");
  const auto code = json.is_object() ? json.find("exit_code") : json.end();
  return code != json.end() && code->is_number_integer() ? std::optional(code->get<int>()) : std::nullopt;
}

std::vector<FailureRecord> LaunchRecords::failures() const {
  std::vector<FailureRecord> found;
  std::error_code ignored;
  if (folder_.empty() || !std::filesystem::is_directory(folder_, ignored)) return found;
  for (const std::string& name : real_fs().list_directory(folder_)) {
    const auto rank = number_after(name, kFailure);
    const Json json = rank ? read_record(folder_ + "/" + name) : Json();
    if (!json.is_object()) continue;
    const auto number = [&](const char* key) -> std::optional<int64_t> {
      const auto value = json.find(key);
      return value != json.end() && value->is_number_integer() ? std::optional(value->get<int64_t>()) : std::nullopt;
    };
    const auto text = [&](const char* key) {
      const auto value = json.find(key);
      return value != json.end() && value->is_string() ? value->get<std::string>() : std::string();
    };
    found.push_back({*rank, static_cast<int>(number("exit_code").value_or(0)),
                     static_cast<int>(number("signal").value_or(0)), text("message"), text("host"), number("step")});
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.rank < b.rank; });
  return found;
}

void LaunchRecords::remove() const {
  if (folder_.empty()) return;
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder_, ignored)) return;
  for (const std::string& name : real_fs().list_directory(folder_)) {
    const bool is_aside = name.ends_with(".tmp");
    if (name == "ready" || name == "done" || number_after(name, kFailure) ||
        (is_aside && (name.starts_with("ready.") || name.starts_with("done.") || name.starts_with(kFailure))))
      real_fs().remove_file(folder_ + "/" + name);
  }
}

}  // namespace lockstep
