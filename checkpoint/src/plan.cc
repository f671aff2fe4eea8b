#include "plan.h"

#include <algorithm>

#include <lockstep/format/tensor_file.h>

namespace lockstep::checkpoint {

std::vector<PlannedBox> plan_boxes(const std::vector<StateTensor>& state, int world_size) {
  std::vector<PlannedBox> plan;
  std::vector<int64_t> load(world_size, 0);
  for (size_t i = 0; i < state.size(); ++i) {
    const ShardLayout& layout = state[i].layout;
    std::vector<Box> done;
    for (const Box& box : layout.boxes) {
      if (box.numel() == 0 || std::find(done.begin(), done.end(), box) != done.end()) continue;
      done.push_back(box);
      int owner = -1;
      for (int rank = 0; rank < world_size; ++rank) {
        if (layout.boxes[rank] == box && (owner < 0 || load[rank] < load[owner])) owner = rank;
      }
      load[owner] += box.numel() * format::item_bytes(layout.dtype);
      plan.push_back({i, box, owner});
    }
  }
  return plan;
}

void remove_leftover(Fs& fs, const std::string& directory) {
  for (const std::string& name : fs.list_directory(directory)) fs.remove_file(directory + "/" + name);
  fs.remove_directory(directory);
}

std::string describe(const std::string& dtype, const std::vector<int64_t>& shape) {
  std::string text = dtype + " [";
  for (size_t d = 0; d < shape.size(); ++d) text += (d ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

}  // namespace lockstep::checkpoint
