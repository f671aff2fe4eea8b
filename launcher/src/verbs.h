#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace lockstep::launcher {

/// Flags of one verb: what was given, by name, and the words that are no flags.
class Arguments {
 public:
  struct Flag {
    const char* name;
    const char* value;  ///< what the value is, for the help; nullptr: a switch
    const char* help;
  };

  /// @param words after the verb; everything after "--" is kept apart in rest(). @throws ConfigError unknown flags,
  /// with the nearest.
  Arguments(const std::vector<std::string>& words, const std::vector<Flag>& known);

  bool has(const std::string& name) const { return find(name).has_value(); }
  std::string get(const std::string& name, const std::string& otherwise) const {
    return find(name).value_or(otherwise);
  }
  /// @throws ConfigError no whole number in [low, high].
  int64_t number(const std::string& name, int64_t otherwise, int64_t low, int64_t high) const;
  const std::vector<std::string>& words() const { return words_; }
  const std::vector<std::string>& rest() const { return rest_; }
  bool has_rest() const { return has_rest_; }
  std::optional<std::string> find(const std::string& name) const;  ///< what was given last

 private:
  std::vector<std::pair<std::string, std::string>> values_;
  std::vector<std::string> words_, rest_;
  bool has_rest_ = false;
};

/// One verb of `lockstep`.
struct Verb {
  const char* name;
  const char* usage;
  const char* summary;
  const std::vector<Arguments::Flag>* flags;
  int (*run)(const Arguments& arguments);
};

extern const Verb kRun, kSubmit, kInspect, kVerify, kImport, kExport, kDoctor;
extern const Verb kAgent;  // hidden: not in the help

/// Paths are shown and joined without a slash at their end.
std::string without_slash(const std::string& path);

/// A line on standard error that counts up while a person waits; nothing where nobody looks.
void show_progress(uint64_t done_bytes, uint64_t total_bytes);

}  // namespace lockstep::launcher
