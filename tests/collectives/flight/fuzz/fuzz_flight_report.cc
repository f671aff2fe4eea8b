// Any text as an agent's report, and what it says as a verdict.
#include <string>

#include <lockstep/base/error.h>
#include <lockstep/flight/verdict.h>

#include "fuzz_target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::flight;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  NodeReport report;
  try {
    report = decode_report(text);
  } catch (const lockstep::CorruptData&) {
    return 0;
  }
  for (const RankReport& rank : report.ranks) {
    FUZZ_CHECK(rank.rank >= 0 && rank.rank < rank.world_size && rank.groups.size() <= kMaxGroups);
    FUZZ_CHECK(rank.stack.find('\x1b') == std::string::npos);
  }
  const std::string once = encode_report(report);
  FUZZ_CHECK(encode_report(decode_report(once)) == once);
  const Verdict verdict = judge(std::span(&report, 1), rules_for(std::span(&report, 1)));
  FUZZ_CHECK((verdict.cause == Cause::kNone) == verdict.message.empty());
  FUZZ_CHECK(!verdict_json(verdict, std::span(&report, 1)).empty());
  const auto stragglers = find_stragglers(std::span(&report, 1));
  FUZZ_CHECK(stragglers.empty() || !describe(stragglers).empty());
  return 0;
}
