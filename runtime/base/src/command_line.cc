#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include <gflags/gflags.h>

#include <lockstep/base/command_line.h>
#include <lockstep/base/error.h>
#include <lockstep/base/text.h>

namespace lockstep {
namespace {

using gflags::CommandLineFlagInfo;
constexpr int kMaxDepth = 4, kMaxFiles = 100;

std::vector<CommandLineFlagInfo> all_flags() {
  std::vector<CommandLineFlagInfo> flags;
  gflags::GetAllFlags(&flags);
  std::erase_if(flags, [](const auto& flag) {
    return flag.filename.find("gflags") != std::string::npos;
  });  // its own would not work here
  return flags;
}

const CommandLineFlagInfo* find_flag(const std::vector<CommandLineFlagInfo>& flags, const std::string& name) {
  const auto found = std::find_if(flags.begin(), flags.end(), [&](const auto& flag) { return flag.name == name; });
  return found == flags.end() ? nullptr : &*found;
}

class Parser {
 public:
  void parse(const std::vector<std::string>& words, int depth) {
    for (size_t i = 0; i < words.size(); ++i) {
      const std::string& word = words[i];
      const size_t dashes = word.find_first_not_of('-');
      if (dashes == 0 || dashes == std::string::npos || dashes > 2) {
        leftover_.push_back(word);
        continue;
      }
      const size_t equals = word.find('=');
      const bool has_value = equals != std::string::npos;
      std::string name = word.substr(dashes, has_value ? equals - dashes : equals);
      std::replace(name.begin(), name.end(), '-', '_');
      const bool is_file = name == "flagfile";
      const CommandLineFlagInfo* flag = find_flag(flags_, name);
      const bool negated = !flag && !has_value && name.starts_with("no");
      if (negated) flag = find_flag(flags_, name.substr(2));
      if (!is_file && (!flag || (negated && flag->type != "bool"))) refuse(name);
      std::string value;
      if (has_value) {
        value = word.substr(equals + 1);
      } else if (!is_file && flag->type == "bool") {
        value = negated ? "false" : "true";
      } else if (i + 1 < words.size()) {
        value = words[++i];
      } else {
        throw ConfigError("--" + name + " needs a value");
      }
      is_file ? parse_file(value, depth + 1) : set(*flag, value);
    }
  }

  std::vector<std::string> leftover() { return std::move(leftover_); }

 private:
  [[noreturn]] void refuse(const std::string& name) const {
    std::vector<std::string> names = {"flagfile"};
    for (const auto& flag : flags_) names.push_back(flag.name);
    throw ConfigError("unknown flag --" + name + did_you_mean(name, names, "--"));
  }

  static void set(const CommandLineFlagInfo& flag, const std::string& value) {
    const bool is_text = value.find('\0') == std::string::npos;  // gflags would take what is before the zero byte
    if (!is_text || gflags::SetCommandLineOption(flag.name.c_str(), value.c_str()).empty()) {
      throw ConfigError("--" + flag.name + "=" + value + " is not a valid " + flag.type + ": " + flag.description);
    }
  }

  void parse_file(const std::string& path, int depth) {
    if (depth > kMaxDepth)
      throw ConfigError("--flagfile=" + path + " is nested deeper than " + std::to_string(kMaxDepth) + " files");
    if (++files_ > kMaxFiles)  // files that name each other many times would keep us here for good
      throw ConfigError("--flagfile=" + path + " is one more than " + std::to_string(kMaxFiles) + " files");
    std::ifstream file(path);
    std::vector<std::string> words;
    for (std::string line; std::getline(file, line);) {
      line.erase(0, line.find_first_not_of(" \t\r"));
      line.erase(line.find_last_not_of(" \t\r") + 1);
      if (!line.empty() && line[0] != '#') words.push_back(line);
    }
    // Not there, or a folder, which can be opened but not read.
    if (file.bad() || !file.eof()) throw ConfigError("--flagfile=" + path + " cannot be read. Mend: check the path");
    parse(words, depth);
  }

  std::vector<CommandLineFlagInfo> flags_ = all_flags();
  std::vector<std::string> leftover_;
  int files_ = 0;
};

void print_help(const char* program, const char* usage, const std::vector<FlagSection>& sections) {
  std::cout << program << ": " << usage << "\n";
  for (const FlagSection& section : sections) {
    std::cout << "\n" << section.heading << "\n";
    for (const auto& flag : all_flags()) {
      if (flag.filename == section.file)
        std::cout << "  --" << flag.name << "=" << flag.default_value << "\n      " << flag.description << "\n";
    }
  }
  std::cout << "\nA file can hold flags, one a line: --flagfile=F\n";
}

}  // namespace

std::vector<std::string> parse_command_line(int argc, char** argv, const char* usage,
                                            const std::vector<FlagSection>& sections) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (std::find(words.begin(), words.end(), "--help") != words.end()) {
    print_help(argv[0], usage, sections);
    std::exit(0);
  }
  Parser parser;
  parser.parse(words, 0);
  return parser.leftover();
}

std::string resolved_flags(const std::vector<FlagSection>& sections) {
  std::string text;
  for (const FlagSection& section : sections) {
    for (const auto& flag : all_flags()) {
      if (flag.filename == section.file) text += "--" + flag.name + "=" + flag.current_value + "\n";
    }
  }
  return text;
}

}  // namespace lockstep
