#include <algorithm>
#include <cstdio>

#include <lockstep/base/error.h>
#include <lockstep/base/text.h>
#include <lockstep/sharding/pipeline_schedule.h>

namespace lockstep {
namespace {

using Kind = ActionKind;

PipelineSchedule empty_schedule(std::string name, int num_stages, int num_chunks, int64_t num_micro_batches) {
  LOCKSTEP_CHECK(num_stages > 0 && num_chunks > 0 && num_micro_batches >= 0)
      << name << " of " << num_stages << " stages, " << num_chunks << " chunks, " << num_micro_batches
      << " micro-batches";
  PipelineSchedule schedule{.name = std::move(name),
                            .num_stages = num_stages,
                            .num_chunks = num_chunks,
                            .num_micro_batches = num_micro_batches};
  schedule.stages.resize(num_stages);
  return schedule;
}

// The order of most schedules: `warm_up` forwards, then forward and backward in turn, then the backwards left over.
std::vector<PipelineAction> in_turn(const std::vector<PipelineAction>& forwards,
                                    const std::vector<PipelineAction>& backwards, size_t warm_up) {
  warm_up = std::min(warm_up, forwards.size());
  std::vector<PipelineAction> actions(forwards.begin(), forwards.begin() + static_cast<int64_t>(warm_up));
  for (size_t i = 0; i < backwards.size(); ++i) {
    if (warm_up + i < forwards.size()) actions.push_back(forwards[warm_up + i]);
    actions.push_back(backwards[i]);
  }
  return actions;
}

// Forwards of micro-batches in order, or backwards.
std::vector<PipelineAction> one_by_one(Kind kind, int64_t num_micro_batches) {
  std::vector<PipelineAction> actions;
  for (int64_t i = 0; i < num_micro_batches; ++i) actions.push_back({kind, i, 0});
  return actions;
}

// Puts each transfer where its producer ends in the chart, in the lists of both stages. A compute action that begins at
// that tick comes after it. So all lists follow one order of all transfers: no circle, whatever blocks whom.
void add_transfers(PipelineSchedule& schedule) {
  if (schedule.num_stages == 1) return;
  struct Transfer {
    int64_t tick;
    int from, to;
    PipelineAction send, receive;
  };
  const int last_stage = schedule.num_stages - 1;
  const PipelineChart times = chart(schedule);
  std::vector<Transfer> transfers;
  for (int stage = 0; stage <= last_stage; ++stage) {
    for (const auto& [action, begin, end] : times.stages[stage]) {
      const int position = action.chunk * schedule.num_stages + stage;
      if (action.kind == Kind::kForward && position < schedule.num_positions() - 1) {
        const int chunk = action.chunk + (stage == last_stage ? 1 : 0);
        transfers.push_back({end,
                             stage,
                             (stage + 1) % schedule.num_stages,
                             {Kind::kSendForward, action.micro_batch, action.chunk},
                             {Kind::kRecvForward, action.micro_batch, chunk}});
      } else if (action.kind == Kind::kBackward && position > 0) {
        const int chunk = action.chunk - (stage == 0 ? 1 : 0);
        transfers.push_back({end,
                             stage,
                             (stage + last_stage) % schedule.num_stages,
                             {Kind::kSendBackward, action.micro_batch, action.chunk},
                             {Kind::kRecvBackward, action.micro_batch, chunk}});
      }
    }
  }
  std::stable_sort(transfers.begin(), transfers.end(),
                   [](const Transfer& a, const Transfer& b) { return a.tick < b.tick; });
  for (int stage = 0; stage <= last_stage; ++stage) {
    std::vector<PipelineAction> actions;
    auto next = times.stages[stage].begin();
    for (const Transfer& transfer : transfers) {
      if (transfer.from != stage && transfer.to != stage) continue;
      for (; next != times.stages[stage].end() && next->begin < transfer.tick; ++next) actions.push_back(next->action);
      actions.push_back(transfer.from == stage ? transfer.send : transfer.receive);
    }
    for (; next != times.stages[stage].end(); ++next) actions.push_back(next->action);
    schedule.stages[stage] = std::move(actions);
  }
}

// The slots of an interleaved schedule, without those left out: micro-batches in groups of num_stages, a group through
// all chunks before the next one.
class Slots {
 public:
  Slots(int num_stages, int num_chunks, int64_t num_micro_batches) : num_stages_(num_stages), num_chunks_(num_chunks) {
    num_slots_ = (num_micro_batches + num_stages - 1) / num_stages * num_stages;
    const int64_t num_left_out = num_slots_ - num_micro_batches;
    micro_batch_of_.assign(num_slots_, 0);
    for (int64_t i = 0; i < num_left_out; ++i) micro_batch_of_[i * num_slots_ / num_left_out] = -1;
    int64_t micro_batch = 0;
    for (int64_t& slot : micro_batch_of_) {
      if (slot == 0) slot = micro_batch++;
    }
  }

  int64_t size() const { return num_slots_ * num_chunks_; }
  std::vector<PipelineAction> in_order(Kind kind) const {
    std::vector<PipelineAction> actions;
    for (int64_t first = 0; first < num_slots_; first += num_stages_) {
      for (int i = 0; i < num_chunks_; ++i) {
        const int chunk = kind == Kind::kForward ? i : num_chunks_ - 1 - i;
        for (int64_t slot = first; slot < first + num_stages_; ++slot)
          actions.push_back({kind, micro_batch_of_[slot], chunk});
      }
    }
    return actions;
  }
  static void leave_out(std::vector<PipelineAction>& actions) {
    std::erase_if(actions, [](const PipelineAction& action) { return action.micro_batch < 0; });
  }

 private:
  int num_stages_, num_chunks_;
  int64_t num_slots_ = 0;
  std::vector<int64_t> micro_batch_of_;  // by slot; -1 left out
};

std::string cell(const PipelineAction& action, int num_chunks) {
  std::string text = (action.kind == Kind::kForward ? "F" : "B") + std::to_string(action.micro_batch);
  if (num_chunks > 1) text += action.chunk < 26 ? std::string(1, static_cast<char>('a' + action.chunk)) : "?";
  return text;
}

}  // namespace

std::string PipelineAction::describe() const {
  static constexpr const char* kNames[] = {"forward",      "backward",      "send_forward",
                                           "recv_forward", "send_backward", "recv_backward"};
  return std::string(kNames[static_cast<int>(kind)]) + " of micro-batch " + std::to_string(micro_batch) + ", chunk " +
         std::to_string(chunk);
}

PipelineSchedule gpipe_schedule(int num_stages, int64_t num_micro_batches) {
  PipelineSchedule schedule = empty_schedule("gpipe", num_stages, 1, num_micro_batches);
  for (auto& actions : schedule.stages) {
    actions = in_turn(one_by_one(Kind::kForward, num_micro_batches), one_by_one(Kind::kBackward, num_micro_batches),
                      num_micro_batches);
  }
  schedule.max_in_flight.assign(num_stages, num_micro_batches);
  add_transfers(schedule);
  return schedule;
}

PipelineSchedule schedule_1f1b(int num_stages, int64_t num_micro_batches) {
  PipelineSchedule schedule = empty_schedule("1f1b", num_stages, 1, num_micro_batches);
  for (int stage = 0; stage < num_stages; ++stage) {
    schedule.stages[stage] = in_turn(one_by_one(Kind::kForward, num_micro_batches),
                                     one_by_one(Kind::kBackward, num_micro_batches), num_stages - 1 - stage);
    schedule.max_in_flight.push_back(std::min<int64_t>(num_micro_batches, num_stages - stage));
  }
  add_transfers(schedule);
  return schedule;
}

PipelineSchedule interleaved_schedule(int num_stages, int num_chunks, int64_t num_micro_batches) {
  if (num_chunks == 1) return schedule_1f1b(num_stages, num_micro_batches);
  PipelineSchedule schedule = empty_schedule("interleaved", num_stages, num_chunks, num_micro_batches);
  const Slots slots(num_stages, num_chunks, num_micro_batches);
  for (int stage = 0; stage < num_stages; ++stage) {
    const int warm_up = 2 * (num_stages - 1 - stage) + (num_chunks - 1) * num_stages;
    schedule.stages[stage] = in_turn(slots.in_order(Kind::kForward), slots.in_order(Kind::kBackward), warm_up);
    Slots::leave_out(schedule.stages[stage]);
    schedule.max_in_flight.push_back(std::min<int64_t>(num_micro_batches * num_chunks, warm_up + 1));
  }
  add_transfers(schedule);
  return schedule;
}

PipelineSchedule forward_only_schedule(int num_stages, int num_chunks, int64_t num_micro_batches) {
  PipelineSchedule schedule = empty_schedule("forward only", num_stages, num_chunks, num_micro_batches);
  schedule.has_backward = false;
  const Slots slots(num_stages, num_chunks, num_micro_batches);
  for (auto& actions : schedule.stages) {
    actions = slots.in_order(Kind::kForward);
    Slots::leave_out(actions);
  }
  schedule.max_in_flight.assign(num_stages, 0);
  add_transfers(schedule);
  return schedule;
}

PipelineSchedule make_schedule(const std::string& name, int num_stages, int num_chunks, int64_t num_micro_batches) {
  if (name == "interleaved") return interleaved_schedule(num_stages, num_chunks, num_micro_batches);
  if (name != "gpipe" && name != "1f1b") {
    throw ConfigError("there is no pipeline schedule '" + name + "'; gpipe, 1f1b and interleaved are" +
                      did_you_mean(name, {"gpipe", "1f1b", "interleaved"}));
  }
  if (num_chunks != 1) {
    throw ConfigError("schedule " + name + " has one chunk a stage, not " + std::to_string(num_chunks) +
                      ". Mend: interleaved, or 1 chunk");
  }
  return name == "gpipe" ? gpipe_schedule(num_stages, num_micro_batches) : schedule_1f1b(num_stages, num_micro_batches);
}

PipelineChart chart(const PipelineSchedule& schedule, TickCosts costs) {
  const int num_positions = schedule.num_positions();
  std::vector<int64_t> forward_end(schedule.num_micro_batches * num_positions, -1), backward_end(forward_end);
  PipelineChart chart{.stages = std::vector<std::vector<PipelineChart::Entry>>(schedule.num_stages)};
  std::vector<size_t> next(schedule.num_stages, 0);
  std::vector<int64_t> now(schedule.num_stages, 0);

  // Runs a stage's next action; false when what it needs is not there yet.
  const auto advance = [&](int stage) {
    const PipelineAction& action = schedule.stages[stage][next[stage]];
    const bool is_forward = action.kind == Kind::kForward;
    if (!action.is_transfer()) {
      const int position = action.chunk * schedule.num_stages + stage;
      const int64_t place = action.micro_batch * num_positions + position;
      const bool is_end = position == (is_forward ? 0 : num_positions - 1);
      const int64_t ready =
          is_forward ? (is_end ? 0 : forward_end[place - 1]) : (is_end ? forward_end[place] : backward_end[place + 1]);
      if (ready < 0 || (!is_forward && forward_end[place] < 0)) return false;
      const int64_t begin = std::max(ready, now[stage]);
      now[stage] = begin + (is_forward ? costs.forward : costs.backward);
      (is_forward ? forward_end : backward_end)[place] = now[stage];
      chart.stages[stage].push_back({action, begin, now[stage]});
    }
    ++next[stage];
    return true;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (int stage = 0; stage < schedule.num_stages; ++stage) {
      while (next[stage] < schedule.stages[stage].size() && advance(stage)) moved = true;
    }
  }
  for (int stage = 0; stage < schedule.num_stages; ++stage) {
    LOCKSTEP_CHECK(next[stage] == schedule.stages[stage].size())
        << "schedule " << schedule.name << ": stage " << stage << " waits for ever in action " << next[stage] << ", "
        << schedule.stages[stage][next[stage]].describe();
    chart.num_ticks = std::max(chart.num_ticks, now[stage]);
  }
  return chart;
}

double PipelineChart::bubble_fraction() const {
  int64_t busiest = 0;
  for (const auto& entries : stages) {
    int64_t busy = 0;
    for (const Entry& entry : entries) busy += entry.end - entry.begin;
    busiest = std::max(busiest, busy);
  }
  return busiest == 0 ? 0 : static_cast<double>(num_ticks - busiest) / static_cast<double>(busiest);
}

std::string draw(const PipelineSchedule& schedule, TickCosts costs) {
  const PipelineChart times = chart(schedule, costs);
  char percent[16];
  std::snprintf(percent, sizeof(percent), "%.1f", 100 * times.bubble_fraction());
  std::string text = schedule.name + ", " + std::to_string(schedule.num_stages) + " stages, " +
                     (schedule.num_chunks > 1 ? std::to_string(schedule.num_chunks) + " chunks each, " : "") +
                     std::to_string(schedule.num_micro_batches) + " micro-batches:";
  if (schedule.has_backward) {
    for (const int64_t limit : schedule.max_in_flight) text += " " + std::to_string(limit);
    text += " in flight,";
  }
  text += std::string(" bubble ") + percent + " % of the ideal time\n";

  size_t width = 2;
  for (const auto& entries : times.stages) {
    for (const auto& entry : entries) width = std::max(width, cell(entry.action, schedule.num_chunks).size());
  }
  const size_t name_width = std::to_string(schedule.num_stages - 1).size();
  for (int stage = 0; stage < schedule.num_stages; ++stage) {
    std::vector<std::string> cells(times.num_ticks, ".");
    for (const auto& [action, begin, end] : times.stages[stage]) {
      for (int64_t tick = begin; tick < end; ++tick)
        cells[tick] = tick == begin ? cell(action, schedule.num_chunks) : "--";
    }
    const std::string name = std::to_string(stage);
    text += "stage " + std::string(name_width - name.size(), ' ') + name + " |";
    for (std::string& shown : cells) text += " " + shown + std::string(width - shown.size(), ' ');
    text.erase(text.find_last_not_of(' ') + 1);
    text += '\n';
  }
  return text;
}

}  // namespace lockstep
