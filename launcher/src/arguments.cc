#include <algorithm>
#include <charconv>
#include <numeric>

#include <lockstep/base/error.h>
#include <lockstep/base/text.h>

#include "verbs.h"

namespace lockstep::launcher {

Arguments::Arguments(const std::vector<std::string>& words, const std::vector<Flag>& known) {
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--") {
      has_rest_ = true;
      rest_.assign(words.begin() + static_cast<std::ptrdiff_t>(i) + 1, words.end());
      return;
    }
    if (word.size() < 2 || word[0] != '-') {
      words_.push_back(word);
      continue;
    }
    const size_t dashes = word.find_first_not_of('-'), equals = word.find('=');
    const std::string name = dashes == std::string::npos
                                 ? word
                                 : word.substr(dashes, equals == std::string::npos ? equals : equals - dashes);
    const auto flag =
        std::find_if(known.begin(), known.end(), [&](const Flag& candidate) { return name == candidate.name; });
    if (flag == known.end()) {
      std::vector<std::string> names;
      names.reserve(known.size());
      for (const Flag& candidate : known) names.emplace_back(candidate.name);
      throw ConfigError("unknown flag " + word + did_you_mean(name, names, "--"));
    }
    if (!flag->value && equals != std::string::npos)
      throw ConfigError(
          std::string(word).append(" gives a value, but --").append(name).append(" is a switch and takes none"));
    if (!flag->value) {
      values_.emplace_back(name, "true");
    } else if (equals != std::string::npos) {
      values_.emplace_back(name, word.substr(equals + 1));
    } else if (i + 1 < words.size() && words[i + 1] != "--") {
      values_.emplace_back(name, words[++i]);
    } else {
      throw ConfigError(word + " needs a value: " + flag->value);
    }
  }
}

std::optional<std::string> Arguments::find(const std::string& name) const {
  for (auto entry = values_.rbegin(); entry != values_.rend(); ++entry) {  // the last one wins
    if (entry->first == name) return entry->second;
  }
  return std::nullopt;
}

int64_t Arguments::number(const std::string& name, int64_t otherwise, int64_t low, int64_t high) const {
  const auto text = find(name);
  if (!text) return otherwise;
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  if (error != std::errc() || end != text->data() + text->size() || value < low || value > high) {
    throw ConfigError("-" + std::string(name.size() > 1 ? "-" : "") + name + "=" + *text + " is no whole number from " +
                      std::to_string(low) + " to " + std::to_string(high));
  }
  return value;
}

}  // namespace lockstep::launcher
