#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep::fuzz {

/// How a run is cut over ranks, and what else must not change its bits. Numbers only, so that a case is a line of text
/// and shrinking is arithmetic; what a default means is the simplest there is.
struct Layout {
  int64_t pipeline = 1, data = 1;
  int64_t zero_stage = 0, zero_shard_size = 0;
  int64_t schedule = 0;  ///< 0 1f1b, 1 gpipe, 2 interleaved
  int64_t chunks = 1;
  int64_t split = 0;         ///< 0: layers are cut by cost; else the seed of a random cut, empty stages included
  int64_t recompute = 0;     ///< 0 none, 1 selective, 2 full
  int64_t bucket_bytes = 0;  ///< 0: the default
  int64_t lanes = 1;
  int64_t expert = 1;         ///< ranks of the data axis that share the experts
  int64_t replica_check = 0;  ///< steps between comparisons of replicas
};

enum ModelKind : int64_t { kStack = 0, kGpt2, kLlama, kPlain, kConv };

/// One composition: a model, how it is trained, and the layout that must do the same as one process.
struct Case {
  int64_t seed = 1;

  // model
  int64_t model = kStack;
  int64_t layers = 1;  ///< besides the first and the last
  int64_t heads = 1, kv_heads = 1, head_dim = 2, ffn_width = 3, vocab = 3, length = 1;
  int64_t experts = 0;  ///< of a Llama; 0: dense
  int64_t tied = 0;
  int64_t frozen = 0;   ///< bit i: layer i of a stack, or unit i
  int64_t dropout = 0;  ///< per cent

  // training
  int64_t micro_batch_size = 1, leaves = 1, steps = 1;
  int64_t optimizer = 0;  ///< 0 SGD with momentum, 1 AdamW
  int64_t clip = 0;       ///< 0 off, 1 seldom, 2 always
  int64_t bf16 = 0;
  int64_t fast = 0;  ///< the back end's own sums: bounded, not equal
  int64_t validation = 0;

  // what changes bits, within bounds
  int64_t tensor = 1, context = 1, sequence_parallel = 0;
  int64_t gentle = 0;  ///< then small steps: these models are steep, and each step multiplies what rounding leaves

  Layout layout;
  int64_t resume_at = 0;  ///< > 0: the step after which the run goes on as `then`
  Layout then;

  std::string plant;  ///< of planted_bug.h; empty: none

  int64_t num_layers() const { return layers + 2; }
  int64_t ranks(const Layout& which) const { return which.pipeline * which.data * context * tensor; }
  bool is_transformer() const { return model == kGpt2 || model == kLlama; }
};

/// The case of a seed: always the same, always a valid one.
Case draw(int64_t seed);

/// Turns any numbers into a case that Lockstep promises to run.
void repair(Case& c);

/// "data=4 model=1 seed=3": what differs from the default.
std::string to_text(const Case& c);
/// @throws ConfigError what is no such text.
Case parse(const std::string& text);

/// Cases simpler in one number, the simplest first.
std::vector<Case> simpler(const Case& c);

/// Layers of each pipeline part as --pipeline_split wants them; empty: by cost.
std::string pipeline_split(const Case& c, const Layout& layout);

}  // namespace lockstep::fuzz
