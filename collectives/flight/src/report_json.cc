#include <algorithm>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/flight/report.h>

namespace lockstep::flight {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxRanks = 4096, kMaxDepth = 8, kMostMembers = size_t{1} << 20;
constexpr int64_t kMaxWorld = 1 << 20, kMaxAgeNs = int64_t{1} << 62;
constexpr size_t kLeastCalls = 16;

[[noreturn]] void refuse(const std::string& problem) { throw CorruptData("a flight report " + problem); }

// Control characters would reach terminals.
std::string clean(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return (c < 0x20 && c != '\n') || c == 0x7f; }, '?');
  return text;
}

Json call_json(const CallReport& call) {
  return Json::array({call.ticket, call.group, call.sequence, static_cast<int>(call.call.op),
                      static_cast<int>(call.call.dtype), static_cast<int>(call.call.reduction), call.call.count,
                      call.call.root, call.fingerprint, call.bucket, clean(call.label), call.begun_ago_ns,
                      call.done_ago_ns});
}

// A progression, as mesh axes are, is three numbers; any other group its list.
Json members_json(const std::vector<int32_t>& members) {
  const int32_t stride = members.size() > 1 ? members[1] - members[0] : 1;
  bool is_progression = !members.empty() && stride > 0;
  for (size_t i = 1; i < members.size(); ++i) is_progression = is_progression && members[i] - members[i - 1] == stride;
  if (is_progression) return {{"first", members[0]}, {"stride", stride}, {"count", members.size()}};
  return members;
}

Json rank_json(const RankReport& rank, size_t most_calls) {
  Json groups = Json::array(), calls = Json::array(), waits = Json::array();
  for (const GroupReport& group : rank.groups) {
    groups.push_back({{"id", group.id},
                      {"name", clean(group.name)},
                      {"members", members_json(group.members)},
                      {"begun", group.begun},
                      {"messages", group.messages},
                      {"fingerprint", group.fingerprint}});
  }
  const size_t skipped = rank.calls.size() > most_calls ? rank.calls.size() - most_calls : 0;
  for (size_t i = 0; i < rank.calls.size(); ++i) {  // of the old ones those that hang matter
    if (i >= skipped || (!rank.calls[i].is_done() && i + kMaxWaits + most_calls >= skipped))
      calls.push_back(call_json(rank.calls[i]));
  }
  for (const WaitReport& wait : rank.waits) waits.push_back({wait.ticket, wait.for_ns});
  return {{"rank", rank.rank},
          {"world_size", rank.world_size},
          {"pid", rank.pid},
          {"liveness", static_cast<int>(rank.liveness)},
          {"wchan", clean(rank.wchan)},
          {"state", static_cast<int>(rank.state)},
          {"phase", static_cast<int>(rank.phase)},
          {"step", rank.step},
          {"beats", rank.beats},
          {"hang_timeout_ns", rank.hang_timeout_ns},
          {"step_p99_ns", rank.step_p99_ns},
          {"compute_ns", rank.compute_ns},
          {"wall_ns", rank.wall_ns},
          {"timed_steps", rank.timed_steps},
          {"exit_kind", rank.exit_kind},
          {"exit_value", rank.exit_value},
          {"exit_message", clean(rank.exit_message)},
          {"stack", clean(rank.stack)},
          {"groups", std::move(groups)},
          {"calls", std::move(calls)},
          {"waits", std::move(waits)}};
}

// Typed, bounded looks into a parsed report.
const Json& member(const Json& object, const char* key) {
  if (!object.is_object()) refuse(std::string("has no object where '") + key + "' should be");
  const auto found = object.find(key);
  if (found == object.end()) refuse(std::string("lacks '") + key + "'");
  return *found;
}

int64_t integer(const Json& value, int64_t low, int64_t high) {
  if (!value.is_number_integer()) refuse("has something else where an integer should be");
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
    refuse("has a number out of range");
  const auto number = value.get<int64_t>();
  if (number < low || number > high) refuse("has a number out of range");
  return number;
}

uint64_t word(const Json& value) {
  if (!value.is_number_unsigned()) refuse("has something else where a count should be");
  return value.get<uint64_t>();
}

std::string text(const Json& value, size_t most) {
  if (!value.is_string()) refuse("has something else where a text should be");
  const auto& found = value.get_ref<const std::string&>();
  if (found.size() > most) refuse("has a text of " + std::to_string(found.size()) + " bytes");
  return clean(found);
}

const Json& list(const Json& value, size_t most) {
  if (!value.is_array()) refuse("has something else where a list should be");
  if (value.size() > most) refuse("has a list of " + std::to_string(value.size()));
  return value;
}

template <typename Enum>
Enum enumerator(const Json& value, Enum last) {
  return static_cast<Enum>(integer(value, 0, static_cast<int64_t>(last)));
}

std::vector<int32_t> members(const Json& value, size_t& budget) {
  std::vector<int32_t> ranks;
  const auto take = [&](size_t count) {
    if (count > budget) refuse("has groups of too many ranks");
    budget -= count;
    ranks.reserve(count);
  };
  if (value.is_object()) {
    const int64_t first = integer(member(value, "first"), 0, kMaxWorld),
                  stride = integer(member(value, "stride"), 1, kMaxWorld);
    const int64_t count = integer(member(value, "count"), 1, kMaxWorld);
    if (first + stride * (count - 1) > kMaxWorld) refuse("has a group of ranks out of range");
    take(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ranks.push_back(static_cast<int32_t>(first + i * stride));
    return ranks;
  }
  take(list(value, kMaxMembers).size());
  for (const Json& rank : value) ranks.push_back(static_cast<int32_t>(integer(rank, 0, kMaxWorld)));
  return ranks;
}

CallReport call_from(const Json& value) {
  if (list(value, 13).size() != 13) refuse("has a call that is no list of 13");
  CallReport call;
  call.ticket = word(value[0]);
  call.group = word(value[1]);
  call.sequence = word(value[2]);
  call.call.op = enumerator(value[3], Op::kStart);
  call.call.dtype = enumerator(value[4], Dtype::kOther);
  call.call.reduction = enumerator(value[5], Reduction::kNone);
  call.call.count = integer(value[6], 0, INT64_MAX);
  call.call.root = static_cast<int32_t>(integer(value[7], -1, kMaxWorld));
  call.fingerprint = word(value[8]);
  call.bucket = static_cast<int32_t>(integer(value[9], -1, INT32_MAX));
  call.label = text(value[10], kLabelBytes);
  call.begun_ago_ns = integer(value[11], 0, kMaxAgeNs);
  call.done_ago_ns = integer(value[12], -1, kMaxAgeNs);
  return call;
}

RankReport rank_from(const Json& value, size_t& budget) {
  RankReport rank;
  rank.rank = static_cast<int32_t>(integer(member(value, "rank"), 0, kMaxWorld));
  rank.world_size = static_cast<int32_t>(integer(member(value, "world_size"), 1, kMaxWorld));
  if (rank.rank >= rank.world_size) refuse("has a rank beyond its world");
  rank.pid = static_cast<int32_t>(integer(member(value, "pid"), 0, INT32_MAX));
  rank.liveness = enumerator(member(value, "liveness"), Liveness::kGone);
  rank.wchan = text(member(value, "wchan"), 64);
  rank.state = enumerator(member(value, "state"), State::kEnded);
  rank.phase = enumerator(member(value, "phase"), Phase::kEnding);
  rank.step = integer(member(value, "step"), -1, INT64_MAX);
  rank.beats = word(member(value, "beats"));
  const auto time = [&](const char* key) { return integer(member(value, key), 0, kMaxAgeNs); };
  rank.hang_timeout_ns = time("hang_timeout_ns");
  rank.step_p99_ns = time("step_p99_ns");
  rank.compute_ns = time("compute_ns");
  rank.wall_ns = time("wall_ns");
  rank.timed_steps = time("timed_steps");
  rank.exit_kind = static_cast<uint32_t>(integer(member(value, "exit_kind"), 0, 2));
  rank.exit_value = static_cast<int32_t>(integer(member(value, "exit_value"), INT32_MIN, INT32_MAX));
  rank.exit_message = text(member(value, "exit_message"), sizeof(Header::exit_message));
  rank.stack = text(member(value, "stack"), sizeof(Header::stack));
  for (const Json& group : list(member(value, "groups"), kMaxGroups)) {
    rank.groups.push_back({word(member(group, "id")), text(member(group, "name"), sizeof(GroupRecord::name)),
                           members(member(group, "members"), budget), word(member(group, "begun")),
                           word(member(group, "messages")), word(member(group, "fingerprint"))});
  }
  for (const Json& call : list(member(value, "calls"), kNumEntries)) rank.calls.push_back(call_from(call));
  for (const Json& wait : list(member(value, "waits"), kMaxWaits)) {
    if (list(wait, 2).size() != 2) refuse("has a wait that is no pair");
    rank.waits.push_back({word(wait[0]), integer(wait[1], 0, kMaxAgeNs)});
  }
  return rank;
}

}  // namespace

std::string encode_report(const NodeReport& report) {
  constexpr size_t kLeastCallBytes = 60;
  size_t most_calls =
      std::min(kNumEntries, kMaxReportBytes / kLeastCallBytes / std::max<size_t>(report.ranks.size(), 1));
  for (;; most_calls /= 2) {
    Json ranks = Json::array();
    for (const RankReport& rank : report.ranks) ranks.push_back(rank_json(rank, most_calls));
    const Json whole = {{"host", clean(report.host)}, {"ranks", std::move(ranks)}};
    std::string encoded = whole.dump(-1, ' ', false, Json::error_handler_t::replace);
    if (encoded.size() <= kMaxReportBytes || most_calls <= kLeastCalls) return encoded;
  }
}

NodeReport decode_report(std::string_view encoded) {
  if (encoded.size() > kMaxReportBytes) refuse("is larger than " + std::to_string(kMaxReportBytes) + " bytes");
  const auto limit_depth = [](int depth, Json::parse_event_t, Json&) {
    if (depth > static_cast<int>(kMaxDepth)) refuse("nests too deep");
    return true;
  };
  Json whole;
  try {
    whole = Json::parse(encoded, limit_depth);
  } catch (const Json::exception& error) {
    refuse(std::string("is no JSON: ") + error.what());
  }
  NodeReport report;
  report.host = text(member(whole, "host"), sizeof(Header::host));
  size_t budget = kMostMembers;
  for (const Json& rank : list(member(whole, "ranks"), kMaxRanks)) report.ranks.push_back(rank_from(rank, budget));
  return report;
}

}  // namespace lockstep::flight
