#pragma once

#include <atomic>
#include <chrono>
#include <future>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/format/writer.h>

#include "plan.h"

namespace lockstep::checkpoint {

/// A save under way. Its parts run one after the other on every rank: the shards, then the manifest.
struct Store::Save {
  std::launch how = std::launch::deferred;  // on the caller's thread, when it asks for the result; async: on another
  Progress progress;
  std::vector<StateTensor> state;  // for the layouts; and the tensors that are written from in place
  std::vector<PlannedBox> plan;
  std::string directory, doing;

  std::vector<at::Tensor> host;            // keeps copies of GPU tensors alive
  std::vector<format::BoxToWrite> boxes;   // of this rank
  std::atomic<uint64_t> written_bytes{0};  // of them
  std::string sha256;                      // of this rank's shard, where asked for
  std::vector<std::string> all_sha256;     // of all ranks' shards
  bool is_slow = false;                    // has been said

  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  double stall_seconds = 0, storage_seconds = 0;
  bool has_shards = false;
  std::future<void> part;  // last: it uses all of the above, and is waited for first
};

/// Removes a folder without a manifest, saying so; a failure is logged and leaves it for the next start.
void remove_unfinished(Fs& fs, const std::string& directory);
/// Removes what a start that died was about to remove.
void remove_retired(Fs& fs, const std::string& checkpoints);

}  // namespace lockstep::checkpoint
