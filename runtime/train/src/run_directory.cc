#include "run_directory.h"

#include <algorithm>
#include <cerrno>

#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/metrics/run_log.h>

namespace lockstep::train {
namespace {

// Folders of an earlier start follow the present --share; a run directory that its user made keeps what it was given.
void share_folders(const std::string& run_dir, Share share) {
  constexpr mode_t kGroupMayRead = S_IRGRP | S_IXGRP;
  struct stat status {};
  for (const char* part : {"", "/checkpoints", "/logs"}) {
    const std::string folder = run_dir + part;
    if (::stat(folder.c_str(), &status) != 0 || status.st_uid != ::geteuid()) continue;
    const mode_t mode = status.st_mode & 07777;
    const mode_t wanted = share == Share::kGroup ? mode | kGroupMayRead : *part ? mode & S_IRWXU : mode;
    if (wanted != mode && ::chmod(folder.c_str(), wanted) != 0) throw IoError("changing the mode of", folder, errno);
  }
}

void try_to_write(Fs& fs, const std::string& probe) {
  fs.remove_file(probe);
  try {
    fs.create_exclusive(probe, 0600)->close();
  } catch (const IoError& error) {
    if (error.error_number() != EEXIST) throw;  // else another start tries it at this very moment
  }
  fs.remove_file(probe);
}

}  // namespace

void prepare_run_directory(Fs& fs, ProcessGroup& world, const std::string& run_dir, Share share) {
  share_new_files(share);
  if (world.rank() == 0) {
    try {
      make_directories(fs, run_dir);
      for (const char* part : {"/checkpoints", "/logs"}) make_directories(fs, run_dir + part);
      try_to_write(fs, run_dir + "/.writable");
    } catch (const IoError& error) {
      throw ConfigError("--run_dir=" + run_dir + " cannot be written: " + error.what() +
                        ". Mend: name a folder this user may create and write");
    }
    share_folders(run_dir, share);
    struct stat status {};
    if (::stat(run_dir.c_str(), &status) == 0 && (status.st_mode & S_IWOTH) && !(status.st_mode & S_ISVTX)) {
      throw ConfigError("--run_dir=" + run_dir + " can be written by every user. Mend: chmod o-w " + run_dir);
    }
  }
  world.barrier(world.control_timeout());
}

RunHistory read_history(Fs& fs, const std::string& run_dir) {
  RunHistory history;
  for (const std::string& line : metrics::read_ledger(fs, run_dir + "/ledger.jsonl")) {
    const auto event = nlohmann::json::parse(line);
    if (!event.contains("epoch")) continue;
    const uint64_t epoch = event.at("epoch");
    const std::string kind = event.at("event"), from = event.value("from", "");
    if (kind == "durable") history.durable.emplace(epoch, event.at("step"));
    if (kind == "start" || (kind == "resume" && !from.empty())) {
      history.first_epoch = epoch;
      history.from = from;
    }
  }
  return history;
}

namespace {

std::vector<std::string> hang_records(Fs& fs, const std::string& run_dir) {
  std::vector<std::string> names;
  try {
    names = fs.list_directory(run_dir);
  } catch (const IoError&) {  // no reason not to train
  }
  std::erase_if(names, [](const std::string& name) { return !name.starts_with("hang-") || !name.ends_with(".json"); });
  return names;
}

}  // namespace

std::vector<std::string> new_hangs(Fs& fs, const std::string& run_dir) {
  constexpr uint64_t kMaxBytes = 1 << 20;
  const std::vector<std::string> records = hang_records(fs, run_dir);
  if (records.empty()) return {};
  std::set<std::string> known;
  for (const std::string& line : metrics::read_ledger(fs, run_dir + "/ledger.jsonl")) {
    const auto event = nlohmann::json::parse(line);
    if (event.value("event", "") == "hang") known.insert(event.value("record", ""));
  }
  std::vector<std::string> events;
  const std::string folder = run_dir + "/";
  for (const std::string& name : records) {
    if (known.contains(name)) continue;
    try {
      const auto verdict = nlohmann::ordered_json::parse(read_text(fs, folder + name, kMaxBytes));
      nlohmann::ordered_json event = {{"record", name}};
      for (const char* key : {"cause", "culprits", "hosts", "group", "sequence", "op", "message"})
        event[key] = verdict.at(key);
      events.push_back(event.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    } catch (const nlohmann::json::exception&) {  // somebody else's
    } catch (const Error&) {
    }
  }
  return events;
}

std::string config_difference(const std::string& was_json, const std::string& now_json,
                              const std::vector<std::string>& accepted) {
  const auto was = nlohmann::json::parse(was_json), now = nlohmann::json::parse(now_json);
  std::string text;
  const auto compare = [&](const std::string& key) {
    const std::string before = was.contains(key) ? was[key].dump() : "not there",
                      after = now.contains(key) ? now[key].dump() : "not there";
    if (before == after || std::find(accepted.begin(), accepted.end(), key) != accepted.end()) return;
    text += "\n  " + key + ": was " + before + ", now " + after;
  };
  for (const auto& [key, value] : now.items()) compare(key);
  for (const auto& [key, value] : was.items()) {
    if (!now.contains(key)) compare(key);
  }
  return text;
}

}  // namespace lockstep::train
