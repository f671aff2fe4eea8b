#include "hosts.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <sstream>

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

#include "machine.h"

namespace lockstep::launcher {
namespace {

constexpr int64_t kMostSlots = 65536;
constexpr size_t kMostHeard = 256;  // hosts whose words are kept: each takes a descriptor

std::optional<int64_t> whole_number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > kMostSlots) return std::nullopt;
  return value;
}

void check_name(const std::string& name, const std::string& where) {
  const auto is_fine = [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '-' || c == '_'; };
  if (!name.empty() && name[0] != '-' && std::all_of(name.begin(), name.end(), is_fine)) return;
  throw ConfigError("'" + name + "' in " + where + " is no host name. Mend: names as in a:4,b:4");
}

void add(std::vector<Host>& hosts, const std::string& name, int64_t slots) {
  const auto known = std::find_if(hosts.begin(), hosts.end(), [&](const Host& host) { return host.name == name; });
  if (known == hosts.end()) {
    hosts.push_back({name, slots});
  } else {
    known->slots += slots;
  }
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

std::string range(int64_t first, int64_t count) {
  return count == 1 ? std::to_string(first) : std::to_string(first) + "-" + std::to_string(first + count - 1);
}

/// @param output -1: nobody reads it.
pid_t start_quietly(const std::vector<std::string>& command, int output) {
  const std::vector<char*> argv = argv_of(command);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_RDWR, 0);
  if (output >= 0) posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);  // so that it can be ended with what it starts
  pid_t pid = -1;
  if (::posix_spawnp(&pid, argv[0], &actions, &attributes, argv.data(), environ) != 0) pid = -1;
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  return pid;
}

struct Pipe {
  UniqueFd read, write;
};

// Holds all that is said until it is read at the end: 64 KiB.
Pipe make_pipe() {
  std::array<int, 2> ends = {-1, -1};
  if (::pipe2(ends.data(), O_CLOEXEC) == 0) ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

std::string read_all(int fd) {
  std::string text(64 << 10, '\0');
  const ssize_t got = ::read(fd, text.data(), text.size());
  text.resize(got > 0 ? static_cast<size_t>(got) : 0);
  return text;
}

}  // namespace

std::vector<Host> parse_host_list(const std::string& list) {
  const std::string where = "--hosts=" + list;
  std::vector<Host> hosts;
  for (std::string& item : split(list, ',')) {
    const size_t colon = item.find(':');
    const auto slots = colon == std::string::npos ? 1 : whole_number(item.substr(colon + 1));
    check_name(item.substr(0, colon), where);
    if (!slots) throw ConfigError("'" + item.append("' in ") + where + " has no number of ranks. Mend: a:4,b:4");
    add(hosts, item.substr(0, colon), *slots);
  }
  if (hosts.empty()) throw ConfigError("--hosts names no host. Mend: --hosts=a:4,b:4");
  return hosts;
}

std::vector<Host> parse_hostfile(const std::string& text, int64_t cores) {
  std::vector<Host> hosts;
  int number = 0;
  for (std::string line : split(text, '\n')) {
    const std::string where = "line " + std::to_string(++number) + " of the hostfile";
    line.erase(std::min(line.find('#'), line.size()));
    std::istringstream words(line);
    std::string name, word;
    if (!(words >> name)) continue;
    check_name(name, where);
    int64_t slots = cores;
    while (words >> word) {
      const auto value = word.starts_with("slots=") ? whole_number(word.substr(6)) : std::nullopt;
      if (!value && !word.starts_with("max_slots=") && !word.starts_with("max-slots="))
        throw ConfigError("'" + word.append("' in ") + where + " is not understood. Mend: NAME slots=N");
      slots = value.value_or(slots);
    }
    add(hosts, name, slots);
  }
  if (hosts.empty()) throw ConfigError("the hostfile names no host. Mend: a line NAME slots=N for each");
  return hosts;
}

std::vector<int64_t> parse_slurm_counts(const std::string& counts) {
  std::vector<int64_t> found;
  for (const std::string& item : split(counts, ',')) {
    const size_t times = item.find("(x");
    const auto count = whole_number(item.substr(0, times));
    const auto nodes = times == std::string::npos || item.back() != ')'
                           ? std::optional<int64_t>(times == std::string::npos ? 1 : 0)
                           : whole_number(item.substr(times + 2, item.size() - times - 3));
    if (!count || nodes.value_or(0) < 1 || static_cast<int64_t>(found.size()) + *nodes > kMostSlots)
      throw ConfigError("Slurm's count of tasks '" + counts + "' is not understood. Mend: pass --hosts=a:4,b:4");
    found.insert(found.end(), static_cast<size_t>(*nodes), *count);
  }
  return found;
}

std::vector<Host> slurm_hosts(const Environment& environment,
                              std::vector<std::string> (*expand)(const std::string& node_list)) {
  const auto list = environment("SLURM_JOB_NODELIST");
  if (!list || !environment("SLURM_JOB_ID")) return {};
  const std::vector<std::string> names = expand(*list);
  // What was asked for in tasks; else every core of the allocation.
  auto counts = environment("SLURM_TASKS_PER_NODE");
  if (!environment("SLURM_NTASKS") && !environment("SLURM_NTASKS_PER_NODE")) counts.reset();
  if (!counts) counts = environment("SLURM_JOB_CPUS_PER_NODE");
  const std::vector<int64_t> slots = parse_slurm_counts(counts.value_or("1(x" + std::to_string(names.size()) + ")"));
  if (slots.size() != names.size() || names.empty())
    throw ConfigError("Slurm names " + std::to_string(names.size()) + " nodes (" + *list + ") and counts for " +
                      std::to_string(slots.size()) + ". Mend: pass --hosts=a:4,b:4");
  std::vector<Host> hosts;
  for (size_t i = 0; i < names.size(); ++i) {
    check_name(names[i], "SLURM_JOB_NODELIST");
    hosts.push_back({names[i], slots[i]});
  }
  return hosts;
}

int64_t total_slots(const std::vector<Host>& hosts) {
  int64_t total = 0;
  for (const Host& host : hosts) total += host.slots;
  return total;
}

const std::string& Placement::host_of(int64_t rank) const {
  auto host = hosts.begin();
  for (; rank >= host->slots; ++host) rank -= host->slots;
  return host->name;
}

std::string Placement::describe() const {
  std::string text;
  int64_t first = 0;
  for (const Host& host : hosts) {
    text += (text.empty() ? "ranks " : ", ") + range(first, host.slots) + " on " + host.name;
    first += host.slots;
  }
  for (size_t i = 0; i < spares.size(); ++i) text += (i == 0 ? "; spare: " : ", ") + spares[i];
  return text;
}

std::optional<Placement> place(const std::vector<Host>& hosts, int64_t most, int64_t least,
                               const std::set<int64_t>& refused) {
  int64_t ranks = std::min(most, total_slots(hosts));
  while (refused.contains(ranks)) --ranks;
  if (ranks < std::max<int64_t>(least, 1)) return std::nullopt;
  Placement placement;
  for (const Host& host : hosts) {
    const int64_t here = std::min(host.slots, ranks);
    if (here > 0) {
      placement.hosts.push_back({host.name, here});
    } else {
      placement.spares.push_back(host.name);
    }
    ranks -= here;
  }
  return placement;
}

std::string own_name() {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  return name.data();
}

bool is_this_machine(const std::string& name) {
  const std::string own = own_name();
  return name == "localhost" || name == "127.0.0.1" || name == own || name == own.substr(0, own.find('.'));
}

bool has_shell(const std::vector<std::string>& agent) {
  return agent.empty() || agent[0].substr(agent[0].rfind('/') + 1) != "srun";
}

std::vector<Host> answering(const std::vector<Host>& hosts, const std::vector<std::string>& agent, double seconds,
                            const std::vector<std::string>& command, std::map<std::string, std::string>* said) {
  std::vector<pid_t> asked(hosts.size(), 0);  // 0: not asked
  std::vector<UniqueFd> outputs(hosts.size());
  std::vector<bool> answers(hosts.size(), false);
  size_t open = 0;
  for (size_t i = 0; i < hosts.size(); ++i) {
    answers[i] = is_this_machine(hosts[i].name);
    if (answers[i]) continue;
    std::vector<std::string> words = agent;
    words.push_back(hosts[i].name);
    words.insert(words.end(), command.begin(), command.end());
    Pipe pipe = said && open < kMostHeard ? make_pipe() : Pipe{UniqueFd(), UniqueFd()};
    asked[i] = start_quietly(words, pipe.write.get());
    outputs[i] = std::move(pipe.read);
    open += asked[i] > 0 ? 1 : 0;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (open > 0 && std::chrono::steady_clock::now() < end) {
    for (size_t i = 0; i < hosts.size(); ++i) {
      int status = 0;
      if (asked[i] <= 0 || ::waitpid(asked[i], &status, WNOHANG) != asked[i]) continue;
      answers[i] = WIFEXITED(status) && WEXITSTATUS(status) == 0;
      asked[i] = 0;
      --open;
    }
    if (open > 0) ::poll(nullptr, 0, 5);
  }
  std::vector<Host> found;
  for (size_t i = 0; i < hosts.size(); ++i) {
    if (asked[i] > 0) {
      ::kill(-asked[i], SIGKILL);
      ::waitpid(asked[i], nullptr, 0);
    }
    if (answers[i]) found.push_back(hosts[i]);
    if (answers[i] && outputs[i]) (*said)[hosts[i].name] = read_all(outputs[i].get());
  }
  return found;
}

}  // namespace lockstep::launcher
