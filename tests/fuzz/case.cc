#include "case.h"

#include <algorithm>
#include <array>
#include <sstream>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>

namespace lockstep::fuzz {
namespace {

constexpr int64_t kMaxRanks = 16;
constexpr int64_t kMaxBits = 8;
constexpr int64_t kMinBoundedWidth = 8;  // norms over fewer numbers are too steep for a bound

class Draw {
 public:
  Draw(int64_t seed, const char* name) : key_(stream_key(static_cast<uint64_t>(seed), name)) {}
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(philox4x32(key_, next_++, 0)[0] % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int64_t per_cent) { return between(0, 99) < per_cent; }
  int64_t pick(std::initializer_list<int64_t> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  uint64_t key_, next_ = 0;
};

struct Field {
  const char* name;
  int64_t* value;
};

std::vector<Field> fields(Case& c) {
  const auto layout = [](Layout& l) {
    return std::vector<int64_t*>{&l.pipeline,     &l.data,   &l.zero_stage, &l.zero_shard_size,
                                 &l.schedule,     &l.chunks, &l.split,      &l.recompute,
                                 &l.bucket_bytes, &l.lanes,  &l.expert,     &l.replica_check};
  };
  constexpr std::array kLayoutNames = {"pipeline",     "data",   "zero_stage", "zero_shard_size",
                                       "schedule",     "chunks", "split",      "recompute",
                                       "bucket_bytes", "lanes",  "expert",     "replica_check"};
  constexpr std::array kThenNames = {"then.pipeline",     "then.data",   "then.zero_stage", "then.zero_shard_size",
                                     "then.schedule",     "then.chunks", "then.split",      "then.recompute",
                                     "then.bucket_bytes", "then.lanes",  "then.expert",     "then.replica_check"};
  std::vector<Field> all = {{"resume_at", &c.resume_at}};
  const auto first = layout(c.layout), then = layout(c.then);
  for (size_t i = 0; i < first.size(); ++i) all.push_back({kThenNames[i], then[i]});
  for (size_t i = 0; i < first.size(); ++i) all.push_back({kLayoutNames[i], first[i]});
  const std::vector<Field> others = {{"tensor", &c.tensor},
                                     {"context", &c.context},
                                     {"sequence_parallel", &c.sequence_parallel},
                                     {"gentle", &c.gentle},
                                     {"model", &c.model},
                                     {"layers", &c.layers},
                                     {"heads", &c.heads},
                                     {"kv_heads", &c.kv_heads},
                                     {"head_dim", &c.head_dim},
                                     {"ffn_width", &c.ffn_width},
                                     {"vocab", &c.vocab},
                                     {"experts", &c.experts},
                                     {"length", &c.length},
                                     {"tied", &c.tied},
                                     {"frozen", &c.frozen},
                                     {"dropout", &c.dropout},
                                     {"micro_batch_size", &c.micro_batch_size},
                                     {"leaves", &c.leaves},
                                     {"steps", &c.steps},
                                     {"optimizer", &c.optimizer},
                                     {"clip", &c.clip},
                                     {"bf16", &c.bf16},
                                     {"fast", &c.fast},
                                     {"validation", &c.validation},
                                     {"seed", &c.seed}};
  all.insert(all.end(), others.begin(), others.end());
  return all;
}

Layout draw_layout(Draw& draw, bool is_pipelined) {
  Layout layout;
  layout.pipeline = is_pipelined && draw.chance(60) ? draw.between(2, 4) : 1;
  layout.data = draw.pick({1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8});
  layout.zero_stage = draw.between(0, 3);
  layout.zero_shard_size = draw.pick({0, 0, 1, 2, 3, 4});
  layout.schedule = draw.between(0, 2);
  layout.chunks = draw.between(1, 3);
  layout.split = draw.chance(40) ? draw.between(1, 1000) : 0;
  layout.recompute = draw.between(0, 2);
  layout.bucket_bytes = draw.pick({0, 1, 64, 1000, 4096, 20000});
  layout.lanes = draw.pick({1, 1, 2, 3});
  layout.expert = draw.between(1, 4);
  layout.replica_check = draw.pick({0, 0, 1, 2});
  return layout;
}

void hold(int64_t& value, int64_t low, int64_t high) { value = std::clamp(value, low, high); }

// The largest value at most `wanted` that divides `whole`.
int64_t divisor(int64_t whole, int64_t wanted) {
  while (whole % wanted != 0) --wanted;
  return wanted;
}

void repair_model(Case& c) {
  hold(c.model, kStack, kConv), hold(c.layers, 1, 6), hold(c.vocab, 2, 64), hold(c.length, 1, 32);
  hold(c.heads, 1, 8), hold(c.kv_heads, 1, 8), hold(c.head_dim, 2, 16), hold(c.ffn_width, 1, 64);
  hold(c.dropout, 0, 90), hold(c.micro_batch_size, 1, 4), hold(c.leaves, 1, 24), hold(c.steps, 1, 8);
  c.frozen &= (1 << kMaxBits) - 1;
  if (c.is_transformer()) c.frozen = 0;  // the example's layers are not ours to freeze
  if (c.model == kGpt2) c.kv_heads = c.heads;
  hold(c.experts, 0, c.model == kLlama ? 6 : 0);
  c.kv_heads = divisor(c.heads, std::min(c.kv_heads, c.heads));
  c.head_dim += c.head_dim % 2;  // RoPE turns pairs
}

void repair_bounded(Case& c) {
  if (!c.is_transformer()) c.tensor = c.context = 1;
  hold(c.context, 1, 3), hold(c.tensor, 1, 4);
  while (c.tensor > c.kv_heads && (c.tensor % c.kv_heads != 0 || c.heads % c.tensor != 0)) --c.tensor;
  c.ffn_width = std::max(c.ffn_width, c.tensor), c.vocab = std::max(c.vocab, c.tensor);
  c.sequence_parallel = c.sequence_parallel != 0 && c.tensor > 1 ? 1 : 0;
  const int64_t step = (c.context > 1 ? 2 * c.context : 1) * (c.sequence_parallel ? c.tensor : 1);
  c.length = (c.length + step - 1) / step * step;
  c.gentle = c.tensor * c.context > 1 || c.fast != 0 ? 1 : 0;
  while (c.gentle && c.heads * c.head_dim < kMinBoundedWidth) c.head_dim += 2;
}

// Ranks that share experts run their micro-batches together, as many each, and keep the experts whole.
void repair_experts(const Case& c, Layout& layout) {
  hold(layout.expert, 1, std::max<int64_t>(1, std::min(c.experts, layout.data)));
  layout.expert = divisor(layout.data, layout.expert);
  if (layout.expert == 1) return;
  if (c.leaves % layout.data != 0) layout.expert = 1;
  if (layout.zero_stage > 1) layout.zero_stage = 1;
  if (layout.zero_stage == 0 || layout.zero_shard_size % layout.expert != 0) layout.zero_shard_size = 0;
}

void repair_layout(const Case& c, Layout& layout) {
  hold(layout.pipeline, 1, c.model == kPlain ? 1 : 6), hold(layout.data, 1, c.leaves), hold(layout.replica_check, 0, 9);
  while (layout.pipeline > 1 && c.ranks(layout) > kMaxRanks) --layout.pipeline;
  while (layout.data > 1 && c.ranks(layout) > kMaxRanks) --layout.data;
  if (c.fast) layout.zero_stage = std::min<int64_t>(layout.zero_stage, 1);
  if (layout.zero_stage == 0 || layout.zero_shard_size < 0 || layout.zero_shard_size > layout.data ||
      (layout.zero_shard_size > 0 && layout.data % layout.zero_shard_size != 0))
    layout.zero_shard_size = 0;
  repair_experts(c, layout);
  if (layout.pipeline == 1) layout.schedule = layout.split = 0;
  layout.chunks = layout.schedule == 2 ? std::max<int64_t>(layout.chunks, 1) : 1;
  if (layout.pipeline > 1 && layout.pipeline * layout.chunks > c.num_layers() && layout.split == 0) layout.split = 1;
}

}  // namespace

void repair(Case& c) {
  repair_model(c);
  repair_bounded(c);
  repair_layout(c, c.layout);
  hold(c.resume_at, 0, c.steps - 1);
  if (c.resume_at == 0) c.then = Layout();
  repair_layout(c, c.then);
}

Case draw(int64_t seed) {
  Draw draw(seed, "fuzz");
  Case c;
  c.seed = seed;
  c.model = draw.pick({kStack, kStack, kStack, kGpt2, kGpt2, kLlama, kLlama, kPlain, kConv});
  c.layers = draw.between(1, 4);
  c.heads = draw.between(1, 4), c.kv_heads = draw.between(1, 4);
  c.head_dim = 2 * draw.between(1, 4), c.ffn_width = draw.between(4, 29);
  c.vocab = draw.between(5, 37), c.length = draw.between(1, 9);
  c.tied = draw.chance(60) ? 1 : 0;
  c.experts = draw.chance(50) ? draw.between(2, 5) : 0;
  c.frozen = draw.chance(40) ? draw.between(0, (1 << kMaxBits) - 1) : 0;
  c.dropout = draw.pick({0, 0, 10, 30});
  c.steps = draw.between(3, 5);
  c.optimizer = draw.between(0, 1);
  c.clip = draw.between(0, 2);
  c.bf16 = draw.chance(20) ? 1 : 0;
  c.fast = draw.chance(5) ? 1 : 0;
  c.validation = draw.chance(30) ? 1 : 0;
  if (c.is_transformer() && draw.chance(50)) {
    c.tensor = draw.between(1, 4), c.context = draw.between(1, 3);
    c.sequence_parallel = draw.between(0, 1);
  }
  c.layout = draw_layout(draw, c.model != kPlain);
  c.resume_at = draw.chance(30) ? draw.between(1, 4) : 0;
  c.then = draw_layout(draw, c.model != kPlain);
  c.micro_batch_size = draw.pick({1, 1, 2, 3});
  c.leaves = std::max(c.layout.data, c.then.data) + draw.between(0, 7);
  if (c.experts > 0 && draw.chance(80)) c.leaves = c.layout.data * draw.between(1, 3);
  repair(c);
  return c;
}

std::string to_text(const Case& c) {
  Case mine = c, plain;
  const auto values = fields(mine), defaults = fields(plain);
  std::string text;
  for (size_t i = 0; i < values.size(); ++i) {
    if (*values[i].value != *defaults[i].value)
      text += std::string(values[i].name) + "=" + std::to_string(*values[i].value) + " ";
  }
  if (!c.plant.empty()) text += "plant=" + c.plant + " ";
  if (text.empty()) return "seed=1";
  text.pop_back();
  return text;
}

Case parse(const std::string& text) {
  Case c;
  const auto known = fields(c);
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals), value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (name == "plant") {
      c.plant = value;
      continue;
    }
    const auto field = std::find_if(known.begin(), known.end(), [&](const Field& f) { return name == f.name; });
    if (field == known.end() || value.empty() || value.find_first_not_of("0123456789") != std::string::npos)
      throw ConfigError("'" + word + "' is no part of a case. Mend: copy the line that a failure printed");
    *field->value = std::stoll(value);
  }
  return c;
}

std::vector<Case> simpler(const Case& c) {
  std::vector<Case> all;
  const std::string text = to_text(c);
  Case plain, original = c;
  const auto defaults = fields(plain), now = fields(original);
  for (size_t i = 0; i < now.size(); ++i) {
    const int64_t value = *now[i].value, simplest = *defaults[i].value;
    int64_t tried = value;
    for (const int64_t next : {simplest, (value + simplest) / 2, value - 1}) {
      if (next == tried || next == value || next < std::min(value, simplest)) continue;
      tried = next;
      Case candidate = c;
      *fields(candidate)[i].value = next;
      repair(candidate);
      if (to_text(candidate) != text) all.push_back(candidate);
    }
  }
  return all;
}

std::string pipeline_split(const Case& c, const Layout& layout) {
  if (layout.split == 0 || layout.pipeline == 1) return "";
  Draw draw(layout.split, "split");
  std::vector<int64_t> counts(layout.pipeline * layout.chunks, 0);
  counts[0] = 1;  // there must be something before anything can be passed on
  for (int64_t i = 1; i < c.num_layers(); ++i) ++counts[draw.between(0, static_cast<int64_t>(counts.size()) - 1)];
  std::string text;
  for (const int64_t count : counts) text += (text.empty() ? "" : ",") + std::to_string(count);
  return text;
}

}  // namespace lockstep::fuzz
