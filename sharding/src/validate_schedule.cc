// Order of the checks: each list for itself, then who sends to whom, then who waits for whom.
#include <map>
#include <optional>
#include <sstream>
#include <utility>

#include <lockstep/base/error.h>
#include <lockstep/sharding/pipeline_schedule.h>

namespace lockstep {
namespace {

using Kind = ActionKind;

struct Place {  // an action: its stage and its index in the list
  int stage = 0;
  size_t index = 0;
};

class Validator {
 public:
  explicit Validator(const PipelineSchedule& schedule) : schedule_(schedule) {}

  void check() {
    LOCKSTEP_CHECK(schedule_.num_stages > 0 && schedule_.num_chunks > 0 &&
                   schedule_.stages.size() == static_cast<size_t>(schedule_.num_stages) &&
                   schedule_.max_in_flight.size() == schedule_.stages.size())
        << "schedule " << schedule_.name << ": " << schedule_.stages.size() << " lists and "
        << schedule_.max_in_flight.size() << " limits for " << schedule_.num_stages << " stages";
    for (int stage = 0; stage < schedule_.num_stages; ++stage) check_list(stage);
    match_transfers();
    check_progress(/*grouped=*/false);
    check_progress(/*grouped=*/true);
  }

 private:
  [[noreturn]] void refuse(const std::string& why) const {
    throw CheckFailed("schedule " + schedule_.name + ": " + why);
  }
  std::string name_of(Place place) const {
    return "stage " + std::to_string(place.stage) + ", action " + std::to_string(place.index) + ": " +
           at(place).describe();
  }
  const PipelineAction& at(Place place) const { return schedule_.stages[place.stage][place.index]; }
  int position(int stage, int chunk) const { return chunk * schedule_.num_stages + stage; }

  // What must stand earlier in the same list. None: the action has no business here.
  std::optional<std::vector<PipelineAction>> needs(int stage, const PipelineAction& action) const {
    const auto [kind, micro_batch, chunk] = action;
    const bool alone = schedule_.num_stages == 1;
    const bool is_first = position(stage, chunk) == 0;
    const bool is_last = position(stage, chunk) == schedule_.num_positions() - 1;
    const PipelineAction forward{Kind::kForward, micro_batch, chunk};
    switch (kind) {
      case Kind::kForward:
        if (is_first) return {{}};
        if (alone) return {{{Kind::kForward, micro_batch, chunk - 1}}};
        return {{{Kind::kRecvForward, micro_batch, chunk}}};
      case Kind::kBackward:
        if (!schedule_.has_backward) return std::nullopt;
        if (is_last) return {{forward}};
        if (alone) return {{forward, {Kind::kBackward, micro_batch, chunk + 1}}};
        return {{forward, {Kind::kRecvBackward, micro_batch, chunk}}};
      case Kind::kSendForward:
        if (alone || is_last) return std::nullopt;
        return {{forward}};
      case Kind::kRecvForward:
        if (alone || is_first) return std::nullopt;
        return {{}};
      case Kind::kSendBackward:
        if (alone || is_first || !schedule_.has_backward) return std::nullopt;
        return {{{Kind::kBackward, micro_batch, chunk}}};
      case Kind::kRecvBackward:
        if (alone || is_last || !schedule_.has_backward) return std::nullopt;
        return {{forward}};
    }
    return std::nullopt;
  }

  using Key = std::tuple<Kind, int64_t, int>;
  static Key key_of(const PipelineAction& action) { return {action.kind, action.micro_batch, action.chunk}; }

  void check_list(int stage) {
    std::map<Key, size_t> seen;
    int64_t in_flight = 0;
    for (size_t i = 0; i < schedule_.stages[stage].size(); ++i) {
      const Place place{stage, i};
      const PipelineAction& action = at(place);
      if (action.micro_batch < 0 || action.micro_batch >= schedule_.num_micro_batches || action.chunk < 0 ||
          action.chunk >= schedule_.num_chunks) {
        refuse(name_of(place) + " is outside " + std::to_string(schedule_.num_micro_batches) + " micro-batches and " +
               std::to_string(schedule_.num_chunks) + " chunks");
      }
      const auto needed = needs(stage, action);
      if (!needed) refuse(name_of(place) + " has no business there");
      for (const PipelineAction& before : *needed) {
        if (!seen.contains(key_of(before)))
          refuse(name_of(place) + " comes without a " + before.describe() + " before it");
      }
      if (!seen.emplace(key_of(action), i).second) refuse(name_of(place) + " comes a second time");
      in_flight += action.kind == Kind::kForward ? 1 : action.kind == Kind::kBackward ? -1 : 0;
      if (schedule_.has_backward && in_flight > schedule_.max_in_flight[stage]) {
        refuse(name_of(place) + " makes " + std::to_string(in_flight) + " in flight, at most " +
               std::to_string(schedule_.max_in_flight[stage]) + " are allowed");
      }
    }
    check_nothing_missing(stage, seen);
  }

  void check_nothing_missing(int stage, const std::map<Key, size_t>& seen) const {
    for (int64_t micro_batch = 0; micro_batch < schedule_.num_micro_batches; ++micro_batch) {
      for (int chunk = 0; chunk < schedule_.num_chunks; ++chunk) {
        for (const Kind kind : {Kind::kForward, Kind::kBackward, Kind::kSendForward, Kind::kRecvForward,
                                Kind::kSendBackward, Kind::kRecvBackward}) {
          const PipelineAction action{kind, micro_batch, chunk};
          if (needs(stage, action) && !seen.contains(key_of(action)))
            refuse("stage " + std::to_string(stage) + " misses " + action.describe());
        }
      }
    }
  }

  // Transfers from one stage to another arrive in the order of their sends: pairs the k-th receive with the k-th send.
  void match_transfers() {
    std::map<std::pair<int, int>, std::vector<Place>> sends, receives;  // by (from, to)
    for (int stage = 0; stage < schedule_.num_stages; ++stage) {
      partner_.emplace_back(schedule_.stages[stage].size());
      for (size_t i = 0; i < schedule_.stages[stage].size(); ++i) {
        const PipelineAction& action = at({stage, i});
        if (!action.is_transfer()) continue;
        const bool to_next = action.kind == Kind::kSendForward || action.kind == Kind::kRecvBackward;
        const int peer = (stage + (to_next ? 1 : schedule_.num_stages - 1)) % schedule_.num_stages;
        if (action.is_send()) sends[{stage, peer}].push_back({stage, i});
        if (!action.is_send()) receives[{peer, stage}].push_back({stage, i});
      }
    }
    for (const auto& [ends, list] : sends) receives.try_emplace(ends);
    for (const auto& [ends, arriving] : receives) match_channel(sends[ends], arriving);
  }

  void match_channel(const std::vector<Place>& sends, const std::vector<Place>& receives) {
    for (size_t k = 0; k < std::max(sends.size(), receives.size()); ++k) {
      if (k >= receives.size()) refuse(name_of(sends[k]) + " has no receive");
      if (k >= sends.size()) refuse(name_of(receives[k]) + " has no send");
      const PipelineAction &send = at(sends[k]), &receive = at(receives[k]);
      const bool is_forward = send.kind == Kind::kSendForward;
      if (receive.kind != (is_forward ? Kind::kRecvForward : Kind::kRecvBackward) ||
          receive.micro_batch != send.micro_batch ||
          position(receives[k].stage, receive.chunk) != position(sends[k].stage, send.chunk) + (is_forward ? 1 : -1)) {
        refuse(name_of(receives[k]) + " is transfer " + std::to_string(k) + " from stage " +
               std::to_string(sends[k].stage) + ", but sent then is " + name_of(sends[k]));
      }
      partner_[sends[k].stage][sends[k].index] = receives[k];
      partner_[receives[k].stage][receives[k].index] = sends[k];
    }
  }

  // Walks all lists until nobody moves. Buffered: a compute action waits for its receive's send to be passed, and
  // transfers wait for nobody. Grouped: neighbouring transfers begin together and end when each one's peer has begun.
  void check_progress(bool grouped) const {
    std::vector<size_t> next(schedule_.num_stages, 0);   // the action a stage stands before, or waits in
    std::vector<size_t> begun(schedule_.num_stages, 0);  // end of what it has begun
    std::vector<std::optional<Place>> blocker(schedule_.num_stages);
    for (bool moved = true; moved;) {
      moved = false;
      for (int stage = 0; stage < schedule_.num_stages; ++stage) {
        const size_t before = next[stage] + begun[stage];
        while (next[stage] < schedule_.stages[stage].size()) {
          const size_t end = end_of_group(stage, next[stage], grouped);
          begun[stage] = std::max(begun[stage], end);
          blocker[stage] =
              grouped ? waits_for(stage, next[stage], end, begun) : waits_for_send(stage, next[stage], begun);
          if (blocker[stage]) break;
          next[stage] = end;
        }
        moved |= next[stage] + begun[stage] != before;
      }
    }
    std::ostringstream waiting;
    for (int stage = 0; stage < schedule_.num_stages; ++stage) {
      if (next[stage] == schedule_.stages[stage].size()) continue;
      waiting << "\n  " << name_of({stage, next[stage]}) << " waits for " << name_of(*blocker[stage]);
    }
    if (!waiting.str().empty())
      refuse(std::string("stages wait for each other in a circle when transfers ") +
             (grouped ? "end in groups:" : "are buffered:") + waiting.str());
  }

  size_t end_of_group(int stage, size_t index, bool grouped) const {
    const auto& list = schedule_.stages[stage];
    size_t end = index + 1;
    while (grouped && list[index].is_transfer() && end < list.size() && list[end].is_transfer()) ++end;
    return end;
  }

  std::optional<Place> waits_for(int stage, size_t begin, size_t end, const std::vector<size_t>& begun) const {
    for (size_t i = begin; i < end; ++i) {
      const auto& peer = partner_[stage][i];
      if (peer && begun[peer->stage] <= peer->index) return peer;
    }
    return std::nullopt;
  }

  std::optional<Place> waits_for_send(int stage, size_t index, const std::vector<size_t>& begun) const {
    const PipelineAction& action = at({stage, index});
    if (action.is_transfer()) return std::nullopt;
    const Kind kind = action.kind == Kind::kForward ? Kind::kRecvForward : Kind::kRecvBackward;
    for (size_t i = index; i-- > 0;) {
      if (at({stage, i}) == PipelineAction{kind, action.micro_batch, action.chunk})
        return waits_for(stage, i, i + 1, begun);
    }
    return std::nullopt;
  }

  const PipelineSchedule& schedule_;
  std::vector<std::vector<std::optional<Place>>> partner_;  // by stage and action
};

}  // namespace

void validate(const PipelineSchedule& schedule) { Validator(schedule).check(); }

}  // namespace lockstep
