#include "strict_json.h"

#include <algorithm>
#include <limits>
#include <set>

#include <lockstep/base/error.h>

namespace lockstep::format {
namespace {

constexpr int kMaxDepth = 32;
// A tree costs up to 100 bytes for each of these characters, and texts are held twice on the way.
constexpr size_t kBytesPerSeparator = 100, kMaxTreeBytes = size_t{128} << 20;

void check_tree_fits(const std::string& text, const std::string& path) {
  const auto separators =
      std::count_if(text.begin(), text.end(), [](char c) { return c == ',' || c == ':' || c == '[' || c == '{'; });
  if (static_cast<size_t>(separators) * kBytesPerSeparator + 2 * text.size() > kMaxTreeBytes)
    throw CorruptData("'" + path + "' holds more values than its kind of file may");
}

bool is_count(const nlohmann::json& value) {
  return value.is_number_unsigned() &&
         value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
}

}  // namespace

nlohmann::json strict_parse(const std::string& text, const std::string& path) {
  check_tree_fits(text, path);
  using Event = nlohmann::json::parse_event_t;
  std::vector<std::set<std::string>> keys;  // of the objects we are inside of
  const auto look = [&](int depth, Event event, nlohmann::json& parsed) {
    if (depth > kMaxDepth) throw CorruptData("'" + path + "' nests JSON deeper than " + std::to_string(kMaxDepth));
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (std::any_of(key.begin(), key.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }))
        throw CorruptData("'" + path + "' has a key with control characters");
      if (!keys.back().insert(key).second) throw CorruptData("'" + path + "' has the key '" + key + "' twice");
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text, look);
  } catch (const nlohmann::json::exception& error) {
    throw CorruptData("'" + path + "' is not valid JSON: " + error.what());
  }
}

const nlohmann::json& member_of(const nlohmann::json& object, const char* key, const std::string& what) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (found == object.end()) throw CorruptData(what + " lacks '" + key + "'");
  return *found;
}

std::string text_of(const nlohmann::json& object, const char* key, const std::string& what) {
  const auto& value = member_of(object, key, what);
  if (!value.is_string()) throw CorruptData(what + ": '" + key + "' is no text");
  return value.get<std::string>();
}

int64_t integer_of(const nlohmann::json& object, const char* key, const std::string& what) {
  const auto& value = member_of(object, key, what);
  if (!value.is_number_integer() || (value.is_number_unsigned() && !is_count(value)))
    throw CorruptData(what + ": '" + key + "' is no integer");
  return value.get<int64_t>();
}

int64_t count_of(const nlohmann::json& object, const char* key, const std::string& what) {
  const int64_t value = integer_of(object, key, what);
  if (value < 0) throw CorruptData(what + ": '" + key + "' is negative");
  return value;
}

std::vector<int64_t> counts_of(const nlohmann::json& object, const char* key, const std::string& what) {
  const auto& values = member_of(object, key, what);
  if (!values.is_array()) throw CorruptData(what + ": '" + key + "' is no list");
  std::vector<int64_t> counts;
  counts.reserve(values.size());
  for (const auto& value : values) {
    if (!is_count(value)) throw CorruptData(what + ": '" + key + "' is not made of counts");
    counts.push_back(value.get<int64_t>());
  }
  return counts;
}

}  // namespace lockstep::format
