#include <algorithm>
#include <map>
#include <memory>
#include <numeric>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/replica_check.h>

namespace lockstep {
namespace {

struct FreeState {
  void operator()(XXH3_state_t* state) const noexcept { XXH3_freeState(state); }
};

}  // namespace

ReplicaCheck::ReplicaCheck(std::vector<Part> parts, int64_t interval_steps)
    : parts_(std::move(parts)), interval_steps_(interval_steps) {
  LOCKSTEP_CHECK(interval_steps > 0) << "an interval of " << interval_steps << " steps";
  int64_t end = 0;
  for (const auto& [name, tensor] : parts_) {
    LOCKSTEP_CHECK(tensor.is_contiguous()) << name << " is not contiguous: its bytes have no order";
    ends_.push_back(end += static_cast<int64_t>(tensor.nbytes()));
  }
}

ReplicaCheck::Range ReplicaCheck::range_of(int64_t bucket) const {
  const int64_t size = (total_bytes() + interval_steps_ - 1) / interval_steps_;
  const int64_t begin = std::min(bucket * size, total_bytes());
  return {begin, std::min(begin + size, total_bytes())};
}

uint64_t ReplicaCheck::digest_for(int64_t step) const {
  const auto [begin, end] = range_of(bucket_of(step));
  const std::unique_ptr<XXH3_state_t, FreeState> state(XXH3_createState());
  LOCKSTEP_CHECK(state != nullptr) << "no memory for a hash";
  XXH3_64bits_reset(state.get());
  for (size_t i = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin(); i < parts_.size(); ++i) {
    const int64_t part_begin = i == 0 ? 0 : ends_[i - 1];
    if (part_begin >= end) break;
    const int64_t from = std::max(begin - part_begin, int64_t{0}), to = std::min(end, ends_[i]) - part_begin;
    const at::Tensor host = parts_[i].tensor.detach().view({-1}).view(at::kByte).narrow(0, from, to - from).cpu();
    XXH3_64bits_update(state.get(), host.const_data_ptr<uint8_t>(), static_cast<size_t>(to - from));
  }
  return XXH3_64bits_digest(state.get());
}

std::string ReplicaCheck::describe(int64_t bucket) const {
  const auto [begin, end] = range_of(bucket);
  std::string text = "bucket " + std::to_string(bucket) + " of " + std::to_string(interval_steps_) + ": " +
                     std::to_string(end - begin) + " bytes";
  if (begin == end) return text;
  const auto part_at = [&](int64_t byte) {
    return static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), byte) - ends_.begin());
  };
  const size_t first = part_at(begin), last = part_at(end - 1);
  text += ", " + parts_[first].name + " from byte " + std::to_string(begin - (first == 0 ? 0 : ends_[first - 1]));
  return first == last ? text : text + " to " + parts_[last].name;
}

Verdict judge(std::span<const uint64_t> digests) {
  std::map<uint64_t, size_t> sizes;
  for (const uint64_t digest : digests) ++sizes[digest];
  if (sizes.size() <= 1) return {};
  size_t largest = 0;
  for (const auto& [digest, size] : sizes) largest = std::max(largest, size);
  const auto num_largest =
      std::count_if(sizes.begin(), sizes.end(), [&](const auto& s) { return s.second == largest; });
  Verdict verdict;
  verdict.is_certain = largest > 1 && num_largest == 1;
  for (size_t rank = 0; rank < digests.size(); ++rank) {
    if (!verdict.is_certain || sizes[digests[rank]] != largest) verdict.suspects.push_back(static_cast<int>(rank));
  }
  return verdict;
}

}  // namespace lockstep
