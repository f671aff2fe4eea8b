#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace lockstep::format {

/// Parses small JSON from a file somebody may have tampered with into a tree, which takes 128 MiB at most; JsonReader
/// is for what may be large. @throws CorruptData syntax (invalid UTF-8 too), duplicate keys, depth over 32, control
/// characters in a key, or too many values.
nlohmann::json strict_parse(const std::string& text, const std::string& path);

// Members of an object, of exactly the type asked for: the library's own get<int64_t>() converts 1e300 too, which is
// undefined behaviour. @throws CorruptData naming `what` and the key.
const nlohmann::json& member_of(const nlohmann::json& object, const char* key, const std::string& what);
std::string text_of(const nlohmann::json& object, const char* key, const std::string& what);
int64_t integer_of(const nlohmann::json& object, const char* key, const std::string& what);
int64_t count_of(const nlohmann::json& object, const char* key, const std::string& what);  ///< >= 0
std::vector<int64_t> counts_of(const nlohmann::json& object, const char* key, const std::string& what);

}  // namespace lockstep::format
