#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/sharding/replica_check.h>

namespace lockstep::train {

/// The replica checks of a run (sharding/replica_check.h): each rank's part of the state against those of the ranks
/// that hold the same.
///
/// Who holds the same is read from the state's layouts: ranks with equal boxes of a tensor. Tensors with the same
/// holders form a set; a rank has few (weights; optimizer shards; a weight tied over stages) and sends a digest for
/// each, in each step of another bucket. Every rank knows all ranks' sets, so every rank comes to the same verdict.
///
/// What it cannot see: a wrong byte of which there is one copy only (full ZeRO-3), or that was handed to all before it
/// was looked at (ZeRO-1 and 2 gather a rank's own rows after each update).
class ReplicaWatch {
 public:
  /// @param state as ParallelModel::state() says it, the same list on every rank; read anew in each step.
  ReplicaWatch(const std::vector<checkpoint::StateTensor>& state, int rank, int64_t interval_steps);

  /// How many digests a rank sends, the same number on all. 0: nothing has a replica.
  size_t num_digests() const { return num_digests_; }
  int64_t interval_steps() const { return interval_steps_; }
  int64_t bucket_of(int64_t step) const { return step % interval_steps_; }
  /// This rank's, of one bucket.
  std::vector<uint64_t> digests(int64_t bucket) const;

  struct Fault {
    size_t set;
    int64_t bucket;
    std::vector<int> suspects;  ///< ranks of the world, ascending
    size_t num_holders;
    bool is_certain;  ///< the others outnumber the suspects and agree
  };
  /// @param all every rank's digests() of this bucket, in rank order.
  std::optional<Fault> find_fault(int64_t bucket, std::span<const uint64_t> all) const;
  struct Finding {
    std::string message;      ///< rank, host, bytes, step, mend
    std::string record_json;  ///< for the ledger
  };
  /// Collective: every rank adds its host, the holders which bytes they are.
  Finding explain(const Fault& fault, int64_t step, ProcessGroup& world) const;

 private:
  int64_t interval_steps_;
  int rank_;
  size_t num_digests_ = 0;
  std::vector<std::vector<int>> holders_;          // by set, ascending
  std::vector<std::vector<size_t>> places_;        // of their digests among everybody's
  std::vector<std::vector<size_t>> sets_of_rank_;  // in the order of their digests
  std::map<size_t, ReplicaCheck> checks_;          // of this rank's sets
};

}  // namespace lockstep::train
