#include "node_reader.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include <ATen/ops/empty.h>

#include <lockstep/base/error.h>

#include "tensor_bytes.h"

namespace lockstep::checkpoint {
namespace {

constexpr uint64_t kWindowBytes = 64 << 20;  // read by a rank before parts are exchanged

}  // namespace

NodeReader::NodeReader(const format::Reader& reader, ProcessGroup& node, std::vector<int> world_ranks, int threads,
                       Milliseconds timeout)
    : reader_(reader),
      node_(node),
      world_ranks_(std::move(world_ranks)),
      threads_(threads),
      timeout_(timeout),
      incoming_(world_ranks_.size()) {}

void NodeReader::want(const StateTensor& tensor, std::span<std::byte> target) {
  const auto found = reader_.manifest().tensors.find(format::tensor_key(tensor.section, tensor.layout.name));
  const auto& [key, stored] = *found;
  const auto item = static_cast<uint64_t>(format::item_bytes(stored.dtype));
  for (const format::StoredBox& box : stored.boxes) {
    const uint64_t box_bytes = static_cast<uint64_t>(box.box.numel()) * item;
    std::map<uint64_t, std::vector<Part>> parts;  // of each chunk that somebody wants, by rank
    for (int rank = 0; rank < node_.size(); ++rank) {
      format::for_each_chunk_run(box.box, tensor.layout.boxes[world_ranks_[rank]], item,
                                 [&](const format::ChunkRun& run) {
                                   parts[run.chunk].push_back({rank, run});
                                 });
    }
    for (auto& [chunk, its_parts] : parts) {
      const uint64_t bytes = std::min(format::kChunkBytes, box_bytes - chunk * format::kChunkBytes);
      plan_chunk(key, box, chunk, bytes, std::move(its_parts), target);
      window_bytes_ += bytes;
      if (window_bytes_ >= kWindowBytes * node_.size()) end_window();
    }
  }
}

void NodeReader::plan_chunk(const std::string& key, const format::StoredBox& box, uint64_t number, uint64_t bytes,
                            std::vector<Part> parts, std::span<std::byte> target) {
  std::vector<int> takers;
  for (const Part& part : parts) {
    if (takers.empty() || takers.back() != part.rank) takers.push_back(part.rank);
  }
  const int reader = takers[takers.size() == 1 ? 0 : turn_++ % takers.size()];
  has_shared_ = has_shared_ || takers.size() > 1;
  if (reader != node_.rank()) {
    for (const Part& part : parts) {
      if (part.rank == node_.rank()) incoming_[reader].push_back(target.subspan(part.run.target, part.run.bytes));
    }
    return;
  }
  const auto own = std::find_if(parts.begin(), parts.end(), [&](const Part& part) { return part.rank == reader; });
  const bool is_in_place = own->run.bytes == bytes;
  if (!is_in_place) scratch_.emplace_back(bytes);
  const auto place = is_in_place ? target.subspan(own->run.target, bytes) : std::span(scratch_.back());
  chunks_.push_back({&key, &box, number, place, is_in_place, target, std::move(parts)});
}

void NodeReader::read_chunks() {
  std::atomic<size_t> next{0};
  std::mutex mutex;
  const auto work = [&] {
    for (size_t i = next++; i < chunks_.size(); i = next++) {
      const Chunk& chunk = chunks_[i];
      try {
        reader_.read_chunk(*chunk.key, *chunk.box, chunk.number, chunk.bytes);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure_) failure_ = std::current_exception();
      }
    }
  };
  std::vector<std::jthread> helpers;
  for (int i = 1; i < std::min<int>(threads_, static_cast<int>(chunks_.size())); ++i) helpers.emplace_back(work);
  work();
}

void NodeReader::exchange_parts() {
  std::vector<std::vector<std::byte>> outgoing(node_.size());
  for (const Chunk& chunk : chunks_) {
    for (const auto& [rank, run] : chunk.parts) {
      const auto bytes = chunk.bytes.subspan(run.offset, run.bytes);
      if (rank != node_.rank()) {
        outgoing[rank].insert(outgoing[rank].end(), bytes.begin(), bytes.end());
      } else if (!chunk.is_in_place) {
        std::memcpy(chunk.target.data() + run.target, bytes.data(), bytes.size());
      }
    }
  }
  if (!has_shared_) return;
  std::vector<int64_t> sends, receives;
  int64_t total_sent = 0, total_received = 0;
  for (int rank = 0; rank < node_.size(); ++rank) {
    sends.push_back(static_cast<int64_t>(outgoing[rank].size()));
    receives.push_back(0);
    for (const auto& place : incoming_[rank]) receives.back() += static_cast<int64_t>(place.size());
    total_sent += sends.back();
    total_received += receives.back();
  }
  const at::Tensor out = at::empty({total_sent}, at::kByte), in = at::empty({total_received}, at::kByte);
  auto* next_out = static_cast<std::byte*>(out.data_ptr());
  for (const auto& bytes : outgoing) next_out = std::copy(bytes.begin(), bytes.end(), next_out);
  node_.all_to_all(in, out, receives, sends, timeout_).wait();
  const auto* next_in = static_cast<const std::byte*>(in.const_data_ptr());
  for (const auto& places : incoming_) {
    for (const auto& place : places) {
      std::memcpy(place.data(), next_in, place.size());
      next_in += place.size();
    }
  }
}

void NodeReader::end_window() {
  read_chunks();
  exchange_parts();
  window_bytes_ = 0;
  has_shared_ = false;
  chunks_.clear();
  scratch_.clear();
  for (auto& places : incoming_) places.clear();
}

void NodeReader::finish() {
  end_window();
  if (failure_) std::rethrow_exception(failure_);
}

}  // namespace lockstep::checkpoint
