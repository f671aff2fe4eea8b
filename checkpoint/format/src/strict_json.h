#pragma once

#include <string>

#include <nlohmann/json.hpp>

namespace lockstep::format {

/// Parses JSON from a file somebody may have tampered with. @throws CorruptData syntax, duplicate keys, depth over 32,
/// or control characters in a key.
nlohmann::json strict_parse(const std::string& text, const std::string& path);

}  // namespace lockstep::format
