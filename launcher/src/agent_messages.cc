#include "agent_messages.h"

#include <algorithm>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>

namespace lockstep::launcher {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMostRanks = 4096, kMostHostBytes = 64, kMostJsonBytes = 256 << 10;
constexpr int64_t kMostRank = 1 << 20;

[[noreturn]] void refuse(const std::string& problem) {
  throw CorruptData("a message between agent and supervisor " + problem);
}

Json parse(std::string_view text) {
  if (text.size() > kMostJsonBytes) refuse("is too long");
  try {
    Json json = Json::parse(text);
    if (!json.is_object()) refuse("is no object");
    return json;
  } catch (const Json::exception&) {
    refuse("is no JSON");
  }
}

const Json& member(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) refuse(std::string("lacks '") + key + "'");
  return *found;
}

int64_t number(const Json& value, int64_t low, int64_t high) {
  if (!value.is_number_integer() || (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}))
    refuse("has something else where an integer should be");
  const auto found = value.get<int64_t>();
  if (found < low || found > high) refuse("has a number out of range");
  return found;
}

std::vector<int32_t> ranks(const Json& value) {
  if (!value.is_array() || value.size() > kMostRanks) refuse("has something else where ranks should be");
  std::vector<int32_t> found;
  found.reserve(value.size());
  for (const Json& rank : value) found.push_back(static_cast<int32_t>(number(rank, 0, kMostRank)));
  return found;
}

std::vector<RankTime> rank_times(const Json& value) {
  if (!value.is_array() || value.size() > kMostRanks) refuse("has something else where ranks should be");
  std::vector<RankTime> found;
  found.reserve(value.size());
  for (const Json& rank : value) {
    if (!rank.is_array() || rank.size() != 3) refuse("has something else where a rank's times should be");
    found.push_back({.rank = static_cast<int32_t>(number(rank[0], 0, kMostRank)),
                     .timed_steps = number(rank[1], 0, INT64_MAX),
                     .compute_ns = number(rank[2], 0, INT64_MAX)});
  }
  return found;
}

Json to_json(const std::vector<RankTime>& ranks) {
  Json json = Json::array();
  for (const RankTime& rank : ranks) json.push_back({rank.rank, rank.timed_steps, rank.compute_ns});
  return json;
}

Heartbeat heartbeat(const Json& json) {
  const Json& host = member(json, "host");
  if (!host.is_string()) refuse("has no host's name");
  Heartbeat heartbeat{.host = host.get<std::string>(),
                      .ranks = rank_times(member(json, "ranks")),
                      .timeout_ms = number(member(json, "timeout_ms"), 0, INT64_MAX / 1'000'000),
                      .step = number(member(json, "step"), -1, INT64_MAX),
                      .out_of_memory_kills = number(member(json, "out_of_memory_kills"), 0, INT64_MAX)};
  const auto is_odd = [](unsigned char c) { return c < 0x20 || c == 0x7f; };  // would reach terminals
  if (heartbeat.host.size() > kMostHostBytes || std::any_of(heartbeat.host.begin(), heartbeat.host.end(), is_odd))
    refuse("has no host's name");
  return heartbeat;
}

Report report(std::string_view body) {
  if (body.size() < sizeof(uint32_t)) refuse("is cut off");
  Report report;
  for (size_t i = sizeof(uint32_t); i-- > 0;) report.number = report.number << 8 | static_cast<uint8_t>(body[i]);
  report.node = flight::decode_report(body.substr(sizeof(uint32_t)));
  return report;
}

struct Encoder {
  std::string operator()(const Heartbeat& heartbeat) const {
    const Json json = {{"host", heartbeat.host},
                       {"ranks", to_json(heartbeat.ranks)},
                       {"timeout_ms", heartbeat.timeout_ms},
                       {"step", heartbeat.step},
                       {"out_of_memory_kills", heartbeat.out_of_memory_kills}};
    return "h" + json.dump(-1, ' ', false, Json::error_handler_t::replace);
  }
  std::string operator()(const Report& report) const {
    std::string body = "r";
    for (size_t i = 0; i < sizeof(uint32_t); ++i) body += static_cast<char>(report.number >> 8 * i & 0xff);
    return body + flight::encode_report(report.node);
  }
  std::string operator()(const Bye&) const { return "b"; }
  std::string operator()(const Heard&) const { return "a"; }
  std::string operator()(const Ask& ask) const {
    return "q" + Json{{"number", ask.number}, {"tail", ask.tail}, {"stacks", ask.stacks}}.dump();
  }
  std::string operator()(const JobOver&) const { return "e"; }
};

}  // namespace

std::string encode(const FromAgent& message) { return std::visit(Encoder{}, message); }
std::string encode(const FromSupervisor& message) { return std::visit(Encoder{}, message); }

FromAgent decode_from_agent(std::string_view body) {
  const std::string_view rest = body.empty() ? body : body.substr(1);
  switch (body.empty() ? '\0' : body[0]) {
    case 'h':
      return heartbeat(parse(rest));
    case 'r':
      return report(rest);
    case 'b':
      if (rest.empty()) return Bye{};
  }
  refuse("is none that is known");
}

FromSupervisor decode_from_supervisor(std::string_view body) {
  const std::string_view rest = body.empty() ? body : body.substr(1);
  if (body == "a") return Heard{};
  if (body == "e") return JobOver{};
  if (!body.starts_with('q')) refuse("is none that is known");
  const Json json = parse(rest);
  return Ask{.number = static_cast<uint32_t>(number(member(json, "number"), 0, UINT32_MAX)),
             .tail = static_cast<uint32_t>(number(member(json, "tail"), 0, flight::kNumEntries)),
             .stacks = ranks(member(json, "stacks"))};
}

}  // namespace lockstep::launcher
