// lockstep: starts jobs and looks at what they left. Links no torch, no MPI: it must outlive the ranks.
#include <algorithm>
#include <iostream>

#include <lockstep/base/error.h>
#include <lockstep/base/text.h>

#include "verbs.h"

namespace lockstep::launcher {
namespace {

const Verb* const kVerbs[] = {&kRun, &kSubmit, &kInspect, &kVerify, &kImport, &kExport, &kDoctor};

void print_help() {
  std::cout << "lockstep: distributed training around LibTorch\n\n";
  for (const Verb* verb : kVerbs) std::cout << "  lockstep " << verb->usage << "\n      " << verb->summary << "\n";
  std::cout << "\nlockstep VERB --help tells more. Exit codes: 0 done, 65 bad data, 70 bug, 73 fenced, 74 storage, 75 "
               "run again, 76 a collective hung, 77 restarts spent, 78 flags or configuration, 79 bad node.\n";
}

void print_help(const Verb& verb) {
  std::cout << "lockstep " << verb.usage << "\n" << verb.summary << "\n\n";
  for (const auto& flag : *verb.flags) {
    const std::string name = flag.name;
    std::cout << "  -" << (name.size() > 1 ? "-" : "") << name << (flag.value ? std::string(" ") + flag.value : "")
              << "\n      " << flag.help << "\n";
  }
}

int dispatch(const std::vector<std::string>& words) {
  if (words.empty() || words[0] == "--help" || words[0] == "-h" || words[0] == "help") {
    print_help();
    return words.empty() ? static_cast<int>(ExitCode::kConfig) : 0;
  }
  if (words[0] == "--version") {
    std::cout << "lockstep " LOCKSTEP_VERSION "\n";
    return 0;
  }
  if (words[0] == kAgent.name) return kAgent.run(Arguments({words.begin() + 1, words.end()}, *kAgent.flags));
  std::vector<std::string> names;
  for (const Verb* verb : kVerbs) {
    names.emplace_back(verb->name);
    if (words[0] != verb->name) continue;
    const auto is_help = [](const std::string& word) { return word == "--help" || word == "-h"; };
    const auto own_end = std::find(words.begin(), words.end(), "--");  // what follows is the program's
    if (std::any_of(words.begin(), own_end, is_help)) {
      print_help(*verb);
      return 0;
    }
    return verb->run(Arguments({words.begin() + 1, words.end()}, *verb->flags));
  }
  throw ConfigError("unknown verb '" + words[0] + "'" + did_you_mean(words[0], names));
}

}  // namespace
}  // namespace lockstep::launcher

int main(int argc, char** argv) {
  try {
    return lockstep::launcher::dispatch({argv + 1, argv + argc});
  } catch (...) {
    const auto failure = lockstep::describe_current_exception();
    std::cerr << "lockstep: " << failure.message << "\n";
    return static_cast<int>(failure.code);
  }
}
