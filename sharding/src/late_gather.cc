#include <algorithm>
#include <utility>

#include <lockstep/base/planted_bug.h>
#include <lockstep/sharding/late_gather.h>

namespace lockstep {
namespace {

constexpr int64_t kFirstBucketBytes = 1 << 20;  // the first forward waits for it

}  // namespace

LateGather::LateGather(ProcessGroup& group, const std::vector<Parameter>& parameters, size_t num_units,
                       int64_t bucket_bytes, Milliseconds timeout, metrics::TraceTrack track)
    : track_(track), needs_(num_units, 0) {
  std::vector<at::Tensor> together;
  int64_t bytes = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& [unit, tensor] = parameters[i];
    together.push_back(tensor);
    bytes += static_cast<int64_t>(tensor.nbytes());
    needs_[unit] = buckets_.size() + 1;
    const int64_t limit = buckets_.empty() ? std::min(kFirstBucketBytes, bucket_bytes) : bucket_bytes;
    const bool is_last = i + 1 == parameters.size();
    if (!is_last && bytes + static_cast<int64_t>(parameters[i + 1].tensor.nbytes()) <= limit) continue;
    ParameterGather gather(group, together, timeout);
    buckets_.push_back({std::exchange(together, {}), std::move(gather)});
    bytes = 0;
  }
  done_ = buckets_.size();
}

void LateGather::start() {
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const metrics::TraceSpan span(track_, "launch parameter gather", "collective", {"bucket", static_cast<int64_t>(i)});
    buckets_[i].gather.start_from(buckets_[i].parameters);
  }
  done_ = 0;
}

void LateGather::require(size_t unit) {
  if (!is_planted(Plant::kEarlyForward)) finish_until(needs_[unit]);
}

void LateGather::finish() { finish_until(buckets_.size()); }

void LateGather::finish_until(size_t end) {
  if (done_.load(std::memory_order_acquire) >= end) return;
  const std::lock_guard lock(mutex_);
  for (size_t i = done_; i < end; ++i) {
    const metrics::TraceSpan span(track_, "wait for parameters", "collective", {"bucket", static_cast<int64_t>(i)});
    if (is_planted(Plant::kStaleParameters) && i + 1 == buckets_.size()) buckets_[i].parameters.clear();
    buckets_[i].gather.finish(buckets_[i].parameters, /*skip_own=*/true);
    done_.store(i + 1, std::memory_order_release);
  }
  if (end < buckets_.size()) buckets_[end].gather.poll();  // moves bytes while we are here
}

}  // namespace lockstep
