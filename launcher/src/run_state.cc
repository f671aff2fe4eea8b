#include "run_state.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>

#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/command_line.h>
#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/format/manifest.h>

#include "verbs.h"

namespace lockstep::launcher {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMostNestedFlagfiles = 4, kMostFlagfiles = 100;  // as the programs' own parser has it
constexpr int64_t kTailBytes = 64 << 10;
constexpr uint64_t kMaxStateBytes = 1 << 20;

void find_flag(const std::vector<std::string>& words, const std::string& wanted, int depth, int& files,
               std::optional<std::string>& found) {
  for (size_t i = 0; i < words.size(); ++i) {
    const size_t dashes = words[i].find_first_not_of('-'), equals = words[i].find('=');
    if (dashes == 0 || dashes == std::string::npos || dashes > 2) continue;
    std::string name = words[i].substr(dashes, equals == std::string::npos ? equals : equals - dashes);
    std::replace(name.begin(), name.end(), '-', '_');
    if (name != wanted && name != "flagfile") continue;
    if (equals == std::string::npos && i + 1 == words.size()) continue;
    const std::string value = equals == std::string::npos ? words[++i] : words[i].substr(equals + 1);
    if (name == wanted) {
      found = value;
    } else if (depth < kMostNestedFlagfiles && files++ < kMostFlagfiles) {
      std::vector<std::string> lines;
      std::ifstream file(value);
      for (std::string line; std::getline(file, line);) {
        line.erase(0, line.find_first_not_of(" \t\r"));
        line.erase(line.find_last_not_of(" \t\r") + 1);
        if (!line.empty() && line[0] != '#') lines.push_back(line);
      }
      find_flag(lines, wanted, depth + 1, files, found);
    }
  }
}

// The last whole line that `take` accepts.
template <typename Take>
void last_line(const std::string& path, Take take) {
  std::ifstream file(path, std::ios::binary);
  file.seekg(0, std::ios::end);
  const int64_t size = file.tellg();
  file.seekg(std::max<int64_t>(0, size - kTailBytes));
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line) && !file.eof();) lines.push_back(std::move(line));
  for (auto line = lines.rbegin(); line != lines.rend(); ++line) {
    const Json json = Json::parse(*line, nullptr, /*allow_exceptions=*/false);
    if (json.is_object() && take(json)) return;
  }
}

// The last value of `key`; 0: none.
double last_number(const std::string& path, const char* key) {
  double value = 0;
  last_line(path, [&](const Json& line) {
    const auto found = line.find(key);
    const bool is_there = found != line.end() && found->is_number();
    if (is_there) value = found->get<double>();
    return is_there;
  });
  return value;
}

std::string state_path(const std::string& run_dir) { return run_dir + "/launch/supervisor.json"; }

Json to_json(const SupervisorState& state) {
  Json seen = Json::array();
  for (const PolicyState::Failure& failure : state.policy.seen)
    seen.push_back({{"step", failure.step ? Json(*failure.step) : Json()}, {"signature", failure.signature}});
  return {{"restarts_used", state.policy.restarts_used},
          {"cycles_without_progress", state.policy.cycles_without_progress},
          {"durable_step", state.policy.durable_step},
          {"seen", seen},
          {"refused_world_sizes", state.refused},
          {"excluded_hosts", state.excluded},
          {"starts", state.starts},
          {"owner", state.owner},
          {"batch_job", state.batch_job},
          {"began_unix_s", state.began_unix_s},
          {"began_at", state.began_at},
          {"job_id", state.job_id}};
}

SupervisorState from_json(const Json& json) {
  SupervisorState state;
  state.policy.restarts_used = json.at("restarts_used");
  state.policy.cycles_without_progress = json.at("cycles_without_progress");
  state.policy.durable_step = json.at("durable_step");
  for (const Json& failure : json.at("seen")) {
    const Json& step = failure.at("step");
    state.policy.seen.push_back(
        {step.is_null() ? std::nullopt : std::optional(step.get<int64_t>()), failure.at("signature")});
  }
  for (const Json& size : json.at("refused_world_sizes")) state.refused.insert(size.get<int64_t>());
  for (const Json& host : json.at("excluded_hosts")) state.excluded.push_back(host);
  state.starts = json.at("starts");
  state.owner = json.at("owner");
  state.batch_job = json.at("batch_job");
  state.began_unix_s = json.at("began_unix_s");
  state.began_at = json.at("began_at");
  state.job_id = json.at("job_id");
  return state;
}

}  // namespace

std::optional<std::string> program_flag(const std::vector<std::string>& words, const std::string& name) {
  std::optional<std::string> found;
  int files = 0;
  find_flag(words, name, 0, files, found);
  return found;
}

std::string program_run_dir(const std::vector<std::string>& words) {
  const std::string named = program_flag(words, "run_dir").value_or("");
  const std::string path = without_slash(std::filesystem::absolute(named.empty() ? kDefaultRunDir : named).string());
  const bool is_known = !named.empty() || ::access((path + "/run.json").c_str(), F_OK) == 0;
  return is_known ? path : "";
}

int64_t newest_durable_step(const std::string& run_dir) {
  try {
    const auto newest = run_dir.empty() ? std::nullopt : format::newest_complete(real_fs(), run_dir + "/checkpoints");
    return newest ? newest->step : -1;
  } catch (const Error&) {
    return -1;
  }
}

std::optional<int64_t> last_reported_step(const std::string& run_dir) {
  std::optional<int64_t> step;
  if (run_dir.empty()) return step;
  last_line(run_dir + "/metrics.jsonl", [&](const Json& line) {
    const auto found = line.find("step");
    if (found != line.end() && found->is_number_integer()) step = found->get<int64_t>();
    return step.has_value();
  });
  return step;
}

double last_save_seconds(const std::string& run_dir) {
  return run_dir.empty() ? 0 : last_number(run_dir + "/ledger.jsonl", "save_s");
}

double last_step_seconds(const std::string& run_dir) {
  return run_dir.empty() ? 0 : last_number(run_dir + "/metrics.jsonl", "step_s");
}

double seconds_in_steps(const std::string& run_dir, int64_t first, int64_t last) {
  struct Line {
    int64_t step = 0;
    double seconds = 0;
  };
  std::vector<Line> lines;
  if (run_dir.empty()) return 0;
  std::ifstream file(run_dir + "/metrics.jsonl");
  for (std::string text; std::getline(file, text) && !file.eof();) {
    const Json line = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    const auto at = line.find("step"), took = line.find("step_s");
    if (at == line.end() || !at->is_number_integer() || took == line.end() || !took->is_number()) continue;
    const auto step = at->get<int64_t>();
    while (!lines.empty() && lines.back().step >= step) lines.pop_back();  // a later start did them again
    lines.push_back({step, took->get<double>()});
  }
  double sum = 0;
  int64_t before = std::max<int64_t>(first, 0);
  for (const Line& line : lines) {
    if (line.step <= first || line.step > last) continue;
    sum += line.seconds * static_cast<double>(line.step - before);  // every so many steps have a line
    before = line.step;
  }
  return sum;
}

std::vector<int64_t> faulty_ranks(const std::string& run_dir) {
  std::vector<int64_t> ranks;
  if (run_dir.empty()) return ranks;
  last_line(run_dir + "/ledger.jsonl", [&](const Json& line) {
    if (line.value("event", Json()) != "replica_fault" || line.value("is_certain", Json()) != true) return true;
    const auto named = line.find("ranks");
    if (named == line.end() || !named->is_array()) return true;
    for (const Json& rank : *named) {
      if (rank.is_number_integer()) ranks.push_back(rank);
    }
    return true;
  });
  return ranks;
}

int64_t out_of_memory_kills() {
  std::ifstream file("/proc/vmstat");
  std::string name;
  for (int64_t count = 0; file >> name >> count;) {
    if (name == "oom_kill") return count;
  }
  return 0;
}

std::optional<SupervisorState> load_supervisor_state(const std::string& run_dir) {
  try {
    if (run_dir.empty() || !real_fs().exists(state_path(run_dir))) return std::nullopt;
    return from_json(Json::parse(read_text(real_fs(), state_path(run_dir), kMaxStateBytes)));
  } catch (const std::exception& error) {
    std::cerr << "lockstep: " << state_path(run_dir) << " cannot be read (" << error.what()
              << "); the restart budget begins anew" << std::endl;
    return std::nullopt;
  }
}

void save_supervisor_state(const std::string& run_dir, const SupervisorState& state) {
  struct stat status {};
  if (run_dir.empty() || ::stat(run_dir.c_str(), &status) != 0) return;
  const std::string path = state_path(run_dir), aside = path + "." + std::to_string(::getpid()) + ".tmp";
  try {
    ::mkdir((run_dir + "/launch").c_str(), 0700);
    real_fs().remove_file(aside);
    write_durable(real_fs(), aside, to_json(state).dump(2) + "\n", 0600);
    real_fs().replace_file(aside, path);
  } catch (const IoError& error) {
    std::cerr << "lockstep: " << error.what() << "; a launcher that follows a killed one begins a new budget"
              << std::endl;
  }
}

void remove_supervisor_state(const std::string& run_dir) {
  if (!run_dir.empty()) ::unlink(state_path(run_dir).c_str());
}

}  // namespace lockstep::launcher
