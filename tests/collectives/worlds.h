#pragma once

#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

/// A world the same test bodies run in. Each back end's binary brings its own list and its own run_ranks.
struct World {
  std::string name;  ///< part of the test's name
  int size = 1;
  int64_t call_limit_elements = 0;  ///< 0: the back end's own; low: every tensor travels in pieces
  bool is_checked = false;          ///< calls are compared over the ranks
  bool is_one_queue = false;        ///< calls run one after the other, without tags: NCCL's on one stream
  int64_t many() const { return call_limit_elements > 0 ? 103 : 10'007; }  ///< a large size that is quick all the same
};
inline std::ostream& operator<<(std::ostream& out, const World& world) { return out << world.name; }

std::vector<World> worlds();

/// Runs `body` on every rank of a fresh world. An exception on one rank fails the test and leaves no rank waiting.
void run_ranks(const World& world, const std::function<void(ProcessGroup&)>& body);

}  // namespace lockstep
