#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep {

/// Pipeline schedules as data: who computes and sends what, in which order. Made here, checked before anything runs,
/// drawn for people, run by pipeline_runner.h. No torch in it.
///
/// Stage: the layers of one pipeline rank. Chunk: a stage's layers may come in num_chunks separate pieces
/// ("interleaved"), so that the pipeline fills in smaller steps. Position: a piece's place in the model, chunk *
/// num_stages + stage: the piece at position g feeds the one at g + 1, which lives on stage (g + 1) % num_stages; the
/// last position makes the loss.
enum class ActionKind : uint8_t {
  kForward,
  kBackward,
  kSendForward,   ///< this piece's output, to the next position
  kRecvForward,   ///< this piece's input, from the position before
  kSendBackward,  ///< the gradient of this piece's input
  kRecvBackward,  ///< the gradient of this piece's output
};

/// What a stage does next, for one micro-batch (counted within this pipeline) and one of its own chunks.
struct PipelineAction {
  ActionKind kind = ActionKind::kForward;
  int64_t micro_batch = 0;
  int chunk = 0;
  bool is_transfer() const { return kind != ActionKind::kForward && kind != ActionKind::kBackward; }
  bool is_send() const { return kind == ActionKind::kSendForward || kind == ActionKind::kSendBackward; }
  std::string describe() const;  ///< "recv_forward of micro-batch 3, chunk 0"
  friend bool operator==(const PipelineAction&, const PipelineAction&) = default;
};

/// Transfers block nobody: a send leaves by itself, a receive is announced, and the forward or backward that needs the
/// tensor waits for it. They stand where the chart below has them travel, on both sides, so all lists agree on one
/// order of all transfers, and neighbouring ones may also go as one group that ends only when all peers have joined in
/// (NCCL).
struct PipelineSchedule {
  std::string name;
  int num_stages = 1;
  int num_chunks = 1;
  int64_t num_micro_batches = 0;
  bool has_backward = true;
  std::vector<std::vector<PipelineAction>> stages;  ///< by stage
  std::vector<int64_t> max_in_flight;  ///< by stage: forwards whose backward is still to come, at most; one a chunk
  int num_positions() const { return num_stages * num_chunks; }
};

/// All forwards, then all backwards: num_micro_batches in flight. Bubble (p - 1) / m of the ideal time.
/// Source: Huang et al., arXiv:1811.06965.
PipelineSchedule gpipe_schedule(int num_stages, int64_t num_micro_batches);
/// Backward as soon as there is one: the same bubble, min(m, p - stage) in flight.
/// Source: Narayanan et al., arXiv:1806.03377 and 2006.09503 (the variant that flushes).
PipelineSchedule schedule_1f1b(int num_stages, int64_t num_micro_batches);
/// 1F1B over num_chunks pieces a stage: bubble (p - 1) / (v m), v times the traffic, up to (v - 1) p + 2 (p - 1 -
/// stage) + 1 pieces in flight. When m is no multiple of p, slots of the next multiple are left out, evenly spread:
/// nothing waits for them, so what was free of deadlock stays so. Source: Narayanan et al., arXiv:2104.04473, 2.2.
PipelineSchedule interleaved_schedule(int num_stages, int num_chunks, int64_t num_micro_batches);
/// For evaluation.
PipelineSchedule forward_only_schedule(int num_stages, int num_chunks, int64_t num_micro_batches);

/// By name: "gpipe", "1f1b", "interleaved". @throws ConfigError unknown name, or chunks with one that has none.
PipelineSchedule make_schedule(const std::string& name, int num_stages, int num_chunks, int64_t num_micro_batches);

/// Checks what running it needs: each piece once forward and once backward, after what it needs; each receive has its
/// send, in the same order from stage to stage; nobody waits in a circle, neither when sends are buffered nor when
/// neighbouring transfers end together; max_in_flight holds.
/// @throws CheckFailed naming stage, action and micro-batch.
void validate(const PipelineSchedule& schedule);

/// When everything happens if each forward and each backward takes its ticks and transfers take none.
struct TickCosts {
  int forward = 1;
  int backward = 2;  ///< gradients of input and weights: two products for one
};
struct PipelineChart {
  struct Entry {
    PipelineAction action;  ///< forward or backward
    int64_t begin = 0, end = 0;
  };
  std::vector<std::vector<Entry>> stages;
  int64_t num_ticks = 0;
  double bubble_fraction() const;  ///< (all ticks - the busiest stage's) / the busiest stage's; 0 when empty
};
/// @throws CheckFailed when stages wait for each other in a circle.
PipelineChart chart(const PipelineSchedule& schedule, TickCosts costs = {});

/// The chart as text, one row a stage, one column a tick:
///
///     1f1b, 2 stages, 3 micro-batches: 2 1 in flight, bubble 33.3 % of the ideal time
///     stage 0 | F0 F1 .  .  B0 -- F2 B1 -- .  B2 --
///     stage 1 | .  F0 B0 -- F1 B1 -- F2 B2 -- .  .
///
/// F0: forward of micro-batch 0; B0 --: its backward; with chunks F0a, F0b, ...
std::string draw(const PipelineSchedule& schedule, TickCosts costs = {});

}  // namespace lockstep
