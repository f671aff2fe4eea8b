#pragma once

#include <cstddef>
#include <exception>
#include <span>
#include <vector>

#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/collectives/process_group.h>
#include <lockstep/format/reader.h>

namespace lockstep::checkpoint {

/// Fills the boxes of all ranks of a node together: a chunk that any of them wants is read, and verified, by one of
/// them, which hands the others their parts of it. So a node reads no byte twice, however many replicas it holds.
///
/// Collective over `node`: all members want the same tensors in the same order. A rank whose storage fails goes on with
/// the others to the end, where it throws.
/// Cost: a byte that m ranks want is read once and sent m - 1 times. Memory: kWindowBytes and what goes out and comes
/// in for them.
class NodeReader {
 public:
  /// @param world_ranks  of each rank of `node`, in its order: the index into ShardLayout::boxes.
  /// @param threads  that read at once on this rank.
  /// @param timeout  for waiting at the slowest rank's storage, each time that parts are exchanged.
  NodeReader(const format::Reader& reader, ProcessGroup& node, std::vector<int> world_ranks, int threads,
             Milliseconds timeout);

  /// @param target  memory of this rank's box, which stays where it is and holds rubbish until finish().
  void want(const StateTensor& tensor, std::span<std::byte> target);
  /// @throws CorruptData, IoError: the first of this rank.
  void finish();

 private:
  struct Part {  // of a chunk, for one rank
    int rank;
    format::ChunkRun run;
  };
  struct Chunk {  // that this rank reads
    const std::string* key;
    const format::StoredBox* box;
    uint64_t number;
    std::span<std::byte> bytes;  // where it is read to: this rank's target, where the chunk lies in one piece there
    bool is_in_place;
    std::span<std::byte> target;
    std::vector<Part> parts;
  };
  void plan_chunk(const std::string& key, const format::StoredBox& box, uint64_t number, uint64_t bytes,
                  std::vector<Part> parts, std::span<std::byte> target);
  void read_chunks();
  void exchange_parts();
  void end_window();

  const format::Reader& reader_;
  ProcessGroup& node_;
  const std::vector<int> world_ranks_;
  const int threads_;
  const Milliseconds timeout_;
  size_t turn_ = 0;  // whose it is to read the next chunk
  // The window: what is read before the parts are exchanged. All ranks close it at the same chunk.
  uint64_t window_bytes_ = 0;
  bool has_shared_ = false;
  std::vector<Chunk> chunks_;
  std::vector<std::vector<std::byte>> scratch_;
  std::vector<std::vector<std::span<std::byte>>> incoming_;  // by rank: where its parts go, in its order
  std::exception_ptr failure_;
};

}  // namespace lockstep::checkpoint
