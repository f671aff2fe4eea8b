#include "memory.h"

#include <array>
#include <cstdio>
#include <cstring>
#include <span>

#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/nn/cpu_allocator.h>

namespace lockstep::train {

int64_t resident_bytes() {
  long pages = 0, resident = 0;
  if (FILE* file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%ld %ld", &pages, &resident) != 2) resident = 0;
    std::fclose(file);
  }
  return static_cast<int64_t>(resident) * sysconf(_SC_PAGESIZE);
}

std::string peak_memory_json(ProcessGroup& world) {
  constexpr std::array<const char*, nn::kMemoryKinds> kNames = {
      "activations and other", "parameters", "gradients", "optimizer", "gathered", "buckets", "scratch"};
  std::array<int64_t, nn::kMemoryKinds> mine{};
  for (size_t kind = 0; kind < mine.size(); ++kind)
    mine[kind] = nn::cpu_memory(static_cast<nn::MemoryKind>(kind)).peak_bytes;
  const std::string all = all_gather_bytes(world, std::as_bytes(std::span(mine)));
  nlohmann::ordered_json peaks;
  for (size_t kind = 0; kind < mine.size(); ++kind) {
    int64_t most = 0;
    for (int rank = 0; rank < world.size(); ++rank) {
      int64_t value = 0;
      std::memcpy(&value, all.data() + (rank * mine.size() + kind) * sizeof(value), sizeof(value));
      most = std::max(most, value);
    }
    peaks[kNames[kind]] = most;
  }
  return peaks.dump();
}

}  // namespace lockstep::train
