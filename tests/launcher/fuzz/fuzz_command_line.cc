// Any text as the command line of a program with a flagfile, read by the program and by the launcher; as the launcher's
// own command line; and as what names hosts. What program and launcher take from one command line is the same.
//
// An input is a word a line; after the first empty line, the flagfile. '@' stands for the flagfile's path.
#include <algorithm>
#include <sstream>

#include <sys/mman.h>
#include <unistd.h>

#include <gflags/gflags.h>

#include <lockstep/base/command_line.h>
#include <lockstep/base/error.h>

#include "../../../launcher/src/hosts.h"
#include "../../../launcher/src/run_state.h"
#include "../../../launcher/src/verbs.h"
#include "fuzz_target.h"

DEFINE_string(run_dir, "", "where");
DEFINE_int64(steps, 10, "how long");
DEFINE_bool(quick, false, "whether");

namespace lockstep::launcher {
namespace {

using Words = std::vector<std::string>;
constexpr int64_t kMostSlots = 65536;

class Flagfile {  // in memory
 public:
  Flagfile() : fd_(::memfd_create("flags", 0)), path_("/proc/self/fd/" + std::to_string(fd_)) { FUZZ_CHECK(fd_ >= 0); }
  const std::string& path() const { return path_; }
  void hold(const std::string& text) const {
    FUZZ_CHECK(::ftruncate(fd_, 0) == 0);
    FUZZ_CHECK(::pwrite(fd_, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()));
  }

 private:
  int fd_;
  std::string path_;
};

struct Input {
  Words words;
  std::string file;
};

Input split(const std::string& text, const std::string& path) {
  Input input;
  std::string filled;
  for (const char c : text) c == '@' ? filled += path : filled += c;
  std::istringstream lines(filled);
  for (std::string line; std::getline(lines, line) && !line.empty();)
    input.words.emplace_back(line.c_str());  // argv's words end at a zero byte
  input.file.assign(std::istreambuf_iterator<char>(lines), {});
  return input;
}

// Whether a flag may take the word after it: the launcher does not know which of a program's flags do.
bool takes_next_word(const std::string& word) {
  return word.find('=') == std::string::npos && word != "--quick" && word != "--noquick";
}

bool has_plain_values(const Input& input) {
  if (std::any_of(input.words.begin(), input.words.end(), takes_next_word)) return false;
  std::istringstream lines(input.file);
  for (std::string line; std::getline(lines, line);) {
    if (takes_next_word(line)) return false;
  }
  return true;
}

void try_program(const Input& input) {
  const std::optional<std::string> by_launcher = program_flag(input.words, "run_dir");
  if (std::find(input.words.begin(), input.words.end(), "--help") != input.words.end()) return;  // would end us
  const gflags::FlagSaver saver;
  Words words = input.words;
  words.insert(words.begin(), "program");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  try {
    parse_command_line(static_cast<int>(argv.size()), argv.data(), "", {});
  } catch (const ConfigError&) {
    return;
  }
  if (has_plain_values(input)) FUZZ_CHECK(by_launcher.value_or("") == FLAGS_run_dir);
}

void try_launcher(const Words& words) {
  try {
    const Arguments arguments(words, {{"n", "RANKS", ""}, {"hosts", "LIST", ""}, {"again", nullptr, ""}});
    FUZZ_CHECK(arguments.has_rest() == (std::find(words.begin(), words.end(), "--") != words.end()));
    FUZZ_CHECK(arguments.words().size() + arguments.rest().size() <= words.size());
    const int64_t ranks = arguments.number("n", 1, 1, kMostSlots);
    FUZZ_CHECK(ranks >= 1 && ranks <= kMostSlots);
  } catch (const ConfigError&) {
  }
}

void check_hosts(const std::vector<Host>& hosts) {
  FUZZ_CHECK(!hosts.empty());
  std::string list;
  for (const Host& host : hosts) {
    FUZZ_CHECK(host.slots >= 1 && host.name.find_first_of(" ;:$`'\"/\\\n") == std::string::npos && host.name[0] != '-');
    if (host.slots > kMostSlots) return;  // of one that came again
    list += (list.empty() ? "" : ",") + host.name + ":" + std::to_string(host.slots);
  }
  FUZZ_CHECK(parse_host_list(list) == hosts);
}

void try_hosts(const std::string& text) {
  try {
    check_hosts(parse_host_list(text));
  } catch (const ConfigError&) {
  }
  try {
    check_hosts(parse_hostfile(text, 8));
  } catch (const ConfigError&) {
  }
  try {
    for (const int64_t count : parse_slurm_counts(text)) FUZZ_CHECK(count >= 1 && count <= kMostSlots);
  } catch (const ConfigError&) {
  }
}

}  // namespace
}  // namespace lockstep::launcher

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::launcher;
  static const Flagfile flagfile;
  const std::string text(reinterpret_cast<const char*>(data), size);
  const Input input = split(text, flagfile.path());
  flagfile.hold(input.file);
  try_program(input);
  try_launcher(input.words);
  try_hosts(text);
  return 0;
}
