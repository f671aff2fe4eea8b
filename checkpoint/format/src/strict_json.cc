#include "strict_json.h"

#include <algorithm>
#include <set>
#include <vector>

#include <lockstep/base/error.h>

namespace lockstep::format {

nlohmann::json strict_parse(const std::string& text, const std::string& path) {
  constexpr int kMaxDepth = 32;
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;  // of the objects we are inside of
  const auto look = [&](int depth, Event event, nlohmann::json& parsed) {
    if (depth > kMaxDepth) throw CorruptData("'" + path + "' nests JSON deeper than " + std::to_string(kMaxDepth));
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) throw CorruptData("'" + path + "' has the key '" + key + "' twice");
      if (std::any_of(key.begin(), key.end(), [](unsigned char letter) { return letter < 0x20; }))
        throw CorruptData("'" + path + "' has a key with control characters");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, look);
  } catch (const nlohmann::json::exception& error) {
    throw CorruptData("'" + path + "' is not valid JSON: " + error.what());
  }
}

}  // namespace lockstep::format
