#include "state.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros_like.h>

namespace lockstep::checkpoint {
namespace {

struct Kind {
  const char* section;
  const char* name;
  std::vector<int64_t> shape;
  at::ScalarType type;
};

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> kinds = {
      {"weights", "embedding.weight", {13, 6}, at::kFloat},
      {"weights", "head.weight", {5, 7}, at::kBFloat16},
      {"weights", "head.bias", {7}, at::kFloat},
      {"weights", "cube", {3, 4, 5}, at::kDouble},
      {"weights", "nothing", {0, 3}, at::kFloat},
      {"buffers", "norm.num_batches", {}, at::kLong},
      {"exp_avg", "embedding.weight", {13, 6}, at::kFloat},
      {"exp_avg", "head.bias", {7}, at::kFloat},
      {"step", "count", {1}, at::kLong},
  };
  return kinds;
}

ShardLayout layout_of(const Kind& kind, Cut cut, int world_size) {
  const std::string dtype = dtype_name(kind.type);
  const auto rows = [&](int parts) { return ShardLayout::sharded(kind.name, kind.shape, dtype, 0, parts); };
  if (cut == Cut::kReplicated || kind.shape.empty())
    return ShardLayout::replicated(kind.name, kind.shape, dtype, world_size);
  if (cut == Cut::kColumns)
    return ShardLayout::sharded(kind.name, kind.shape, dtype, static_cast<int>(kind.shape.size()) - 1, world_size);
  if (cut == Cut::kRows || world_size % 2 != 0) return rows(world_size);
  ShardLayout layout = rows(world_size / 2);
  const std::vector<Box> again = layout.boxes;
  layout.boxes.insert(layout.boxes.end(), again.begin(), again.end());
  return layout;
}

at::Tensor filled_box(const Kind& kind, const Box& box, int salt) {
  int64_t numel = 1;
  for (const int64_t size : kind.shape) numel *= size;
  at::Tensor part = at::arange(numel, at::kDouble)
                        .mul(3)
                        .add(int64_t{17} * salt + static_cast<int64_t>(std::string(kind.section).size()))
                        .remainder(251)  // exact in bfloat16
                        .reshape(kind.shape);
  for (size_t d = 0; d < box.sizes.size(); ++d)
    part = part.narrow(static_cast<int64_t>(d), box.offsets[d], box.sizes[d]);
  return part.contiguous().to(kind.type);
}

}  // namespace

std::vector<StateTensor> make_state(Cut cut, int world_size, int rank, int salt, bool filled) {
  std::vector<StateTensor> state;
  for (const Kind& kind : kinds()) {
    ShardLayout layout = layout_of(kind, cut, world_size);
    at::Tensor local = filled_box(kind, layout.boxes[rank], salt);
    state.push_back({kind.section, std::move(layout), filled ? local : at::zeros_like(local)});
  }
  return state;
}

std::string first_difference(const std::vector<StateTensor>& state, int rank, int salt) {
  for (size_t i = 0; i < state.size(); ++i) {
    const at::Tensor expected = filled_box(kinds()[i], state[i].layout.boxes[rank], salt);
    if (!at::equal(state[i].local, expected))
      return state[i].section + " " + state[i].layout.name + " on rank " + std::to_string(rank);
  }
  return "";
}

Progress progress_at(int64_t step) {
  return {.step = step,
          .samples = 8 * step,
          .config_json = R"({"learning_rate":0.1})",
          .record_json = R"({"torch":"2.11"})",
          .data_fingerprint = "data"};
}

}  // namespace lockstep::checkpoint
