#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace lockstep {

/// Finds the replica whose memory went wrong (a flipped bit, a bad core): replicas that do the same steps hold the same
/// bytes, so their digests agree.
///
/// The tensors' bytes, end to end, are cut into `interval_steps` buckets of one size; each step hashes one, in turn, so
/// that all are hashed once in as many steps and no step pays more than the others. The digest travels in whatever the
/// step exchanges anyway; judge() reads everybody's.
/// Threads: one at a time, while nobody writes the tensors. Cost: reads total bytes / interval_steps a step, at the
/// speed of memory; 8 bytes sent.
class ReplicaCheck {
 public:
  struct Part {
    std::string name;
    at::Tensor tensor;  ///< contiguous; read anew in each step
  };

  /// The same list on all replicas. @param interval_steps > 0.
  ReplicaCheck(std::vector<Part> parts, int64_t interval_steps);

  /// XXH3-64 of the bucket of this step.
  uint64_t digest_for(int64_t step) const;

  int64_t bucket_of(int64_t step) const { return step % interval_steps_; }
  /// For a message, e.g. "bucket 3 of 50: 1048576 bytes, block0.up.weight from byte 4096 to block1.norm1.bias".
  std::string describe(int64_t bucket) const;

  int64_t interval_steps() const { return interval_steps_; }
  int64_t total_bytes() const { return ends_.empty() ? 0 : ends_.back(); }

 private:
  struct Range {
    int64_t begin, end;
  };
  Range range_of(int64_t bucket) const;

  std::vector<Part> parts_;
  std::vector<int64_t> ends_;  // of each part, in bytes from the first one's begin
  int64_t interval_steps_;
};

/// Whose digest is wrong. Pure: every rank that hands in the same digests gets the same verdict.
struct Verdict {
  std::vector<int> suspects;  ///< ascending; none: all agree
  bool is_certain = true;     ///< the others agree with each other and outnumber any that do; else all are suspects
  bool is_alike() const { return suspects.empty(); }
};

/// @param digests by replica. The largest set of replicas that agree, if it is the only one of its size and more than
/// one, is right and the others are suspects: from 3 replicas on a single wrong one is named. Without such a set (1:1,
/// 2:2, 1:1:1) all are.
Verdict judge(std::span<const uint64_t> digests);

}  // namespace lockstep
