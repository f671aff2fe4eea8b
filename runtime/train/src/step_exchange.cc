#include "step_exchange.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

namespace lockstep::train {

static_assert(std::is_trivially_copyable_v<StepReport>, "its bytes travel");

StepReport exchange(ProcessGroup& group, const StepReport& mine, std::vector<uint64_t>* digests,
                    std::vector<double>* busy) {
  if (busy) busy->assign(static_cast<size_t>(group.size()), mine.busy);
  if (group.size() == 1) return mine;
  const size_t digest_bytes = digests ? digests->size() * sizeof(uint64_t) : 0;
  std::vector<std::byte> message(sizeof(StepReport) + digest_bytes);
  std::memcpy(message.data(), &mine, sizeof(StepReport));
  if (digest_bytes > 0) std::memcpy(message.data() + sizeof(StepReport), digests->data(), digest_bytes);
  const std::string all = all_gather_bytes(group, message);

  StepReport merged;
  if (digests) digests->resize(group.size() * digest_bytes / sizeof(uint64_t));
  for (int rank = 0; rank < group.size(); ++rank) {
    const char* theirs = all.data() + rank * message.size();
    StepReport report;
    std::memcpy(&report, theirs, sizeof(StepReport));
    merged.merge(report);
    if (busy) (*busy)[static_cast<size_t>(rank)] = report.busy;
    if (digest_bytes > 0)
      std::memcpy(digests->data() + rank * digest_bytes / sizeof(uint64_t), theirs + sizeof(StepReport), digest_bytes);
  }
  return merged;
}

std::optional<SlowestRank> slowest_rank(std::span<const double> busy) {
  const auto is_unknown = [](double share) { return !(share > 0); };
  if (busy.size() < 2 || std::any_of(busy.begin(), busy.end(), is_unknown)) return std::nullopt;
  const auto slowest = std::max_element(busy.begin(), busy.end());
  std::vector<double> sorted(busy.begin(), busy.end());
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>((sorted.size() - 1) / 2);  // of two the faster
  std::nth_element(sorted.begin(), middle, sorted.end());
  return SlowestRank{static_cast<int>(slowest - busy.begin()), *slowest / *middle};
}

}  // namespace lockstep::train
