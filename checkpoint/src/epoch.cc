#include "epoch.h"

#include <array>
#include <chrono>
#include <cstring>
#include <fstream>
#include <thread>

#include <signal.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/checkpoint/checkpoint.h>

namespace lockstep::checkpoint {
namespace {

using Json = nlohmann::ordered_json;
constexpr std::chrono::seconds kWatch{30};  // of our own clock: hosts' clocks are not compared

std::string text_of(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  return text;
}

// When a process began, in clock ticks since boot: with the pid it names a process for good. Field 22 of
// /proc/PID/stat.
std::string start_time_of(int64_t pid) {
  const std::string stat = text_of("/proc/" + std::to_string(pid) + "/stat");
  std::istringstream fields(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));
  std::string field;
  for (int number = 3; number <= 22 && fields >> field; ++number) {
  }
  return stat.empty() ? "" : field;
}

std::string host_name() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

std::string job_id() {
  const char* id = std::getenv("SLURM_JOB_ID");
  return id ? id : "";
}

Json myself() {
  return {{"host", host_name()},
          {"boot_id", text_of("/proc/sys/kernel/random/boot_id")},
          {"pid", getpid()},
          {"start_time", start_time_of(getpid())},
          {"slurm_job_id", job_id()}};
}

std::string epoch_path(const std::string& run_dir, uint64_t epoch) {
  return run_dir + "/epoch/" + std::to_string(epoch);
}

std::string read_or_empty(Fs& fs, const std::string& path) {
  return fs.exists(path) ? read_text(fs, path, 1 << 16) : "";
}

// Whether the start that owns `epoch` still works on this run.
bool is_alive(Fs& fs, const std::string& run_dir, uint64_t epoch) {
  const std::string path = epoch_path(run_dir, epoch);
  if (fs.exists(path + ".done")) return false;
  const Json owner = Json::parse(read_text(fs, path, 1 << 16), nullptr, /*allow_exceptions=*/false);
  if (!owner.is_object()) return false;  // torn by a crash while it was made
  const Json me = myself();
  if (owner["host"] == me["host"]) {
    const auto pid = owner.value("pid", int64_t{0});
    return owner["boot_id"] == me["boot_id"] && pid != getpid() && !start_time_of(pid).empty() &&
           start_time_of(pid) == owner.value("start_time", "");
  }
  if (!job_id().empty() && owner.value("slurm_job_id", "") == job_id())
    return false;  // our own job, requeued elsewhere
  const std::string before = read_or_empty(fs, path + ".beat");
  LOG(INFO) << "an earlier start on host " << owner["host"] << " did not sign off; watching its heartbeat for "
            << kWatch.count() << " s";
  for (int second = 0; second < kWatch.count(); ++second) {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    if (read_or_empty(fs, path + ".beat") != before) return true;
  }
  return false;
}

}  // namespace

uint64_t newest_epoch(Fs& fs, const std::string& run_dir) {
  uint64_t newest = 0;
  for (const std::string& name : fs.list_directory(run_dir + "/epoch")) {
    if (name.find_first_not_of("0123456789") == std::string::npos)
      newest = std::max<uint64_t>(newest, std::stoull(name));
  }
  return newest;
}

uint64_t acquire_epoch(Fs& fs, ProcessGroup& world, const std::string& run_dir, bool take_over) {
  uint64_t epoch = 0;
  if (world.rank() == 0) {
    if (!fs.exists(run_dir + "/epoch")) make_directories(fs, run_dir + "/epoch");
    const uint64_t before = newest_epoch(fs, run_dir);
    if (before > 0 && !take_over && is_alive(fs, run_dir, before)) {
      throw Fenced("another start (epoch " + std::to_string(before) + ": " +
                   read_text(fs, epoch_path(run_dir, before), 1 << 16) + ") works on " + run_dir +
                   ". Mend: let it end, or end it, or start with --take_over");
    }
    epoch = before + 1;
    try {
      write_durable(fs, epoch_path(run_dir, epoch), myself().dump());
    } catch (const IoError& error) {
      if (error.error_number() == EEXIST)
        throw Fenced("two starts raced for " + run_dir + " and the other one won epoch " + std::to_string(epoch));
      throw;
    }
  }
  at::Tensor shared = broadcast_number(world, static_cast<int64_t>(epoch));
  return static_cast<uint64_t>(*shared.const_data_ptr<int64_t>());
}

void release_epoch(Fs& fs, const std::string& run_dir, uint64_t epoch) {
  const std::string done = epoch_path(run_dir, epoch) + ".done";
  if (!fs.exists(done)) fs.create_exclusive(done, 0600)->close();
}

void beat(Fs& fs, const std::string& run_dir, uint64_t epoch, uint64_t count) {
  std::array<char, 24> text{};
  std::snprintf(text.data(), text.size(), "%020llu",
                static_cast<unsigned long long>(count));  // fixed width: written over in place
  const auto file = fs.open_append(epoch_path(run_dir, epoch) + ".beat", 0600);
  file->write_at(0, std::as_bytes(std::span(text.data(), 20)));
  file->close();
}

}  // namespace lockstep::checkpoint
