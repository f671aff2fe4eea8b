#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <optional>
#include <thread>

#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/base/process.h>
#include <lockstep/format/fencing.h>

namespace lockstep::format {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kMaxOwnerBytes = 1 << 16;
constexpr size_t kMaxEpochDigits = 18;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  return text;
}

std::string host_name() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

Json myself(const Starter& starter) {
  return {{"host", host_name()},      {"boot_id", first_line("/proc/sys/kernel/random/boot_id")},
          {"pid", getpid()},          {"start_time", start_time_of(getpid())},
          {"job_id", starter.job_id}, {"job_start", starter.job_start}};
}

std::string epoch_path(const std::string& run_dir, uint64_t epoch) {
  return run_dir + "/epoch/" + std::to_string(epoch);
}

std::string text_member(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_string() ? found->get<std::string>() : "";
}

// Which start of our own job `owner` is; nullopt: of no job, or of another.
std::optional<int64_t> start_of_our_job(const Json& owner, const Starter& starter) {
  if (!owner.is_object() || starter.job_id.empty() || text_member(owner, "job_id") != starter.job_id)
    return std::nullopt;
  const auto number = owner.find("job_start");
  return number != owner.end() && number->is_number_integer() ? number->get<int64_t>() : 0;
}

bool moves(Fs& fs, const std::string& path, const Starter& starter) {
  const auto read = [&] { return fs.exists(path) ? read_text(fs, path, kMaxOwnerBytes) : ""; };
  const std::string before = read();
  const auto end = std::chrono::steady_clock::now() + starter.watch;
  while (std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::min<std::chrono::milliseconds>(starter.watch / 10, std::chrono::seconds(1)));
    if (read() != before) return true;
  }
  return false;
}

// Whether the start that owns `epoch` still works on this run.
bool is_alive(Fs& fs, const std::string& run_dir, uint64_t epoch, const Starter& starter) {
  const std::string path = epoch_path(run_dir, epoch);
  if (fs.exists(path + ".done")) return false;
  const Json owner = Json::parse(read_text(fs, path, kMaxOwnerBytes), nullptr, /*allow_exceptions=*/false);
  if (!owner.is_object()) return false;  // not written by create_epoch, so nobody's
  const Json me = myself(starter);
  // The boot id is the machine's name for this; host names repeat ("localhost") and a reboot ends every process.
  if (text_member(owner, "boot_id") == text_member(me, "boot_id") && text_member(owner, "host") == me["host"]) {
    const auto pid = owner.find("pid");
    if (pid == owner.end() || !pid->is_number_integer() || *pid == me["pid"]) return false;
    const std::string started = start_time_of(pid->get<pid_t>());
    return !started.empty() && started == text_member(owner, "start_time");
  }
  if (const auto start = start_of_our_job(owner, starter)) return *start > starter.job_start;  // requeued elsewhere
  LOG(INFO) << "an earlier start on host " << text_member(owner, "host") << " did not sign off; watching its heartbeat "
            << "for " << starter.watch.count() << " ms";
  return moves(fs, path + ".beat", starter);
}

}  // namespace

uint64_t newest_epoch(Fs& fs, const std::string& run_dir) {
  uint64_t newest = 0;
  if (!fs.exists(run_dir + "/epoch")) return newest;
  for (const std::string& name : fs.list_directory(run_dir + "/epoch")) {
    if (name.size() <= kMaxEpochDigits && name.find_first_not_of("0123456789") == std::string::npos)
      newest = std::max<uint64_t>(newest, std::stoull(name));
  }
  return newest;
}

uint64_t create_epoch(Fs& fs, const std::string& run_dir, const Starter& starter) {
  make_directories(fs, run_dir + "/epoch");
  const Json me = myself(starter);
  for (;;) {
    const uint64_t before = newest_epoch(fs, run_dir);
    if (before > 0 && !starter.take_over && is_alive(fs, run_dir, before, starter)) {
      throw Fenced("another start (epoch " + std::to_string(before) + ": " +
                   read_text(fs, epoch_path(run_dir, before), kMaxOwnerBytes) + ") works on '" + run_dir +
                   "'. Mend: let it end, or end it, or start with --take_over");
    }
    const uint64_t epoch = before + 1;
    const std::string path = epoch_path(run_dir, epoch);
    // Written aside and renamed, so that a rival never sees a file without its owner in it.
    const std::string aside = path + "." + me["host"].get<std::string>() + "." + std::to_string(getpid()) + ".tmp";
    fs.remove_file(aside);  // of an earlier process with our pid
    try {
      write_durable(fs, aside, me.dump());
      fs.rename_exclusive(aside, path);
      fs.sync_directory(run_dir + "/epoch");
      return epoch;
    } catch (const IoError& error) {
      fs.remove_file(aside);
      if (error.error_number() != EEXIST) throw;
    }
    // An earlier start of our own job may have been cut off with this very operation under way: then the next epoch.
    const Json winner = Json::parse(read_text(fs, path, kMaxOwnerBytes), nullptr, /*allow_exceptions=*/false);
    const auto start = start_of_our_job(winner, starter);
    if (!start || *start >= starter.job_start)
      throw Fenced("two starts raced for '" + run_dir + "' and the other one won epoch " + std::to_string(epoch));
  }
}

void release_epoch(Fs& fs, const std::string& run_dir, uint64_t epoch) {
  const std::string done = epoch_path(run_dir, epoch) + ".done";
  if (!fs.exists(done)) fs.create_exclusive(done, 0600)->close();
}

void beat(Fs& fs, const std::string& run_dir, uint64_t epoch, uint64_t count) {
  std::array<char, 24> text{};  // fixed width: written over in place
  const int length = std::snprintf(text.data(), text.size(), "%020llu", static_cast<unsigned long long>(count));
  const auto file = fs.open_append(epoch_path(run_dir, epoch) + ".beat", 0600);
  file->write_at(0, std::as_bytes(std::span(text.data(), static_cast<size_t>(length))));
  file->close();
}

}  // namespace lockstep::format
