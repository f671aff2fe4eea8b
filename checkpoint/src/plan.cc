#include "plan.h"

#include <algorithm>
#include <map>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/tensor_file.h>

namespace lockstep::checkpoint {
namespace {

struct Item {
  PlannedBox planned;
  int64_t bytes = 0;
  std::vector<int> holders;  // ranks, rising
};

std::vector<Item> list_items(const std::vector<StateTensor>& state) {
  std::vector<Item> items;
  for (size_t i = 0; i < state.size(); ++i) {
    const ShardLayout& layout = state[i].layout;
    std::map<Box, std::vector<int>> holders;
    for (size_t rank = 0; rank < layout.boxes.size(); ++rank) {
      if (layout.boxes[rank].numel() > 0) holders[layout.boxes[rank]].push_back(static_cast<int>(rank));
    }
    for (auto& [box, ranks] : holders)
      items.push_back({{i, box, ranks.front()}, box.numel() * format::item_bytes(layout.dtype), std::move(ranks)});
  }
  return items;
}

}  // namespace

std::vector<PlannedBox> plan_boxes(const std::vector<StateTensor>& state, int world_size) {
  std::vector<Item> items = list_items(state);
  std::vector<Item*> shared;
  std::vector<int64_t> load(world_size, 0);
  for (Item& item : items) {
    if (item.holders.size() == 1) {
      load[item.holders.front()] += item.bytes;
    } else {
      shared.push_back(&item);
    }
  }
  std::stable_sort(shared.begin(), shared.end(), [](const Item* a, const Item* b) { return a->bytes > b->bytes; });
  for (Item* item : shared) {
    item->planned.owner = *std::min_element(item->holders.begin(), item->holders.end(),
                                            [&](int a, int b) { return load[a] < load[b]; });  // the first of equals
    load[item->planned.owner] += item->bytes;
  }
  std::vector<PlannedBox> plan;
  plan.reserve(items.size());
  for (Item& item : items) plan.push_back(std::move(item.planned));
  return plan;
}

void check_same_plan(ProcessGroup& world, const std::vector<StateTensor>& state, const std::vector<PlannedBox>& plan) {
  std::vector<std::string> texts;
  texts.reserve(state.size());
  for (const StateTensor& tensor : state)
    texts.push_back(tensor.section + " " + tensor.layout.name + " " +
                    describe(tensor.layout.dtype, tensor.layout.shape));
  for (const PlannedBox& planned : plan) {
    std::string& text = texts[planned.tensor];
    for (const auto& numbers : {planned.box.offsets, planned.box.sizes})
      for (const int64_t number : numbers) text += " " + std::to_string(number);
    text += " of " + std::to_string(planned.owner);
  }
  std::string mine;
  for (const std::string& text : texts) mine += format::digest(text);
  const std::vector<std::string> all = all_gather_text(world, mine);
  for (int rank = 1; rank < world.size(); ++rank) {
    const auto differs = std::mismatch(all[0].begin(), all[0].end(), all[rank].begin(), all[rank].end()).first;
    if (differs == all[0].end() && all[rank].size() == all[0].size()) continue;
    const size_t index = static_cast<size_t>(differs - all[0].begin()) / format::digest("").size();
    throw CheckFailed("rank " + std::to_string(rank) + " plans another checkpoint than rank 0: " +
                      (index < texts.size() ? texts[index] + " here" : "it has more tensors"));
  }
}

std::string describe(const std::string& dtype, const std::vector<int64_t>& shape) {
  std::string text = dtype + " [";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

}  // namespace lockstep::checkpoint
