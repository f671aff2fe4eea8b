#include "replica_watch.h"

#include <algorithm>
#include <array>

#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>

namespace lockstep::train {
namespace {

// The ranks of each box that has several.
std::vector<std::vector<int>> replicas_of(const ShardLayout& layout) {
  std::map<Box, std::vector<int>> holders;
  for (size_t rank = 0; rank < layout.boxes.size(); ++rank) {
    const Box& box = layout.boxes[rank];
    if (box.numel() > 0) holders[box].push_back(static_cast<int>(rank));
  }
  std::vector<std::vector<int>> several;
  for (auto& [box, ranks] : holders) {
    if (ranks.size() > 1) several.push_back(std::move(ranks));
  }
  return several;
}

}  // namespace

ReplicaWatch::ReplicaWatch(const std::vector<checkpoint::StateTensor>& state, int rank, int64_t interval_steps)
    : interval_steps_(interval_steps), rank_(rank) {
  std::map<std::vector<int>, size_t> numbers;
  std::map<size_t, std::vector<ReplicaCheck::Part>> parts;
  for (const checkpoint::StateTensor& tensor : state) {
    sets_of_rank_.resize(tensor.layout.boxes.size());
    for (const auto& ranks : replicas_of(tensor.layout)) {
      const auto [entry, is_new] = numbers.try_emplace(ranks, holders_.size());
      const size_t set = entry->second;
      if (is_new) {
        holders_.push_back(ranks);
        for (const int holder : ranks) sets_of_rank_[holder].push_back(set);
      }
      if (std::binary_search(ranks.begin(), ranks.end(), rank))
        parts[set].push_back({tensor.section + " of " + tensor.layout.name, tensor.local});
    }
  }
  for (const auto& sets : sets_of_rank_) num_digests_ = std::max(num_digests_, sets.size());
  places_.resize(holders_.size());
  for (size_t holder = 0; holder < sets_of_rank_.size(); ++holder) {
    for (size_t place = 0; place < sets_of_rank_[holder].size(); ++place)
      places_[sets_of_rank_[holder][place]].push_back(holder * num_digests_ + place);
  }
  for (auto& [set, members] : parts) checks_.emplace(set, ReplicaCheck(std::move(members), interval_steps));
}

std::vector<uint64_t> ReplicaWatch::digests(int64_t bucket) const {
  std::vector<uint64_t> digests(num_digests_);
  if (num_digests_ == 0) return digests;
  const auto& sets = sets_of_rank_[rank_];
  for (size_t place = 0; place < sets.size(); ++place) digests[place] = checks_.at(sets[place]).digest_for(bucket);
  return digests;
}

std::optional<ReplicaWatch::Fault> ReplicaWatch::find_fault(int64_t bucket, std::span<const uint64_t> all) const {
  LOCKSTEP_CHECK(all.size() == num_digests_ * sets_of_rank_.size())
      << all.size() << " digests from " << sets_of_rank_.size() << " ranks with " << num_digests_ << " each";
  for (size_t set = 0; set < holders_.size(); ++set) {
    const auto digest_of = [&](size_t holder) { return all[places_[set][holder]]; };
    size_t alike = 1;
    while (alike < holders_[set].size() && digest_of(alike) == digest_of(0)) ++alike;
    if (alike == holders_[set].size()) continue;
    std::vector<uint64_t> digests;
    for (size_t holder = 0; holder < holders_[set].size(); ++holder) digests.push_back(digest_of(holder));
    const Verdict verdict = judge(digests);
    Fault fault{set, bucket, {}, holders_[set].size(), verdict.is_certain};
    for (const int suspect : verdict.suspects) fault.suspects.push_back(holders_[set][suspect]);
    return fault;
  }
  return std::nullopt;
}

ReplicaWatch::Finding ReplicaWatch::explain(const Fault& fault, int64_t step, ProcessGroup& world) const {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  const auto hosts = all_gather_text(world, host.data());
  const auto check = checks_.find(fault.set);
  const auto places = all_gather_text(world, check == checks_.end() ? "" : check->second.describe(fault.bucket));

  const std::string& where = places[fault.suspects.front()];
  nlohmann::ordered_json record = {{"step", step}, {"is_certain", fault.is_certain}, {"where", where}};
  std::string who;
  for (const int suspect : fault.suspects) {
    who += (who.empty() ? "rank " : ", rank ") + std::to_string(suspect) + " on host " + hosts[suspect];
    record["ranks"].push_back(suspect);
    record["hosts"].push_back(hosts[suspect]);
  }
  const std::string verdict =
      fault.is_certain ? "; the other " + std::to_string(fault.num_holders - fault.suspects.size()) + " replicas agree"
                       : "; no majority of the " + std::to_string(fault.num_holders) +
                             " replicas agrees, so any of these may be the wrong one";
  const int64_t last_good = std::max<int64_t>(0, step - interval_steps_);
  return {
      "replicas differ at step " + std::to_string(step) + ": " + who + verdict + " (" + where +
          "). A bit flipped in memory, or a core computes wrongly. Mend: take the host out of the job and run again; "
          "checkpoints after step " +
          std::to_string(last_good) + " may carry the fault: --resume=PATH goes on from an older one",
      record.dump()};
}

}  // namespace lockstep::train
