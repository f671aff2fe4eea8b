// Every state that a power loss may leave of a row of saves, systematically: each is loaded.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <unordered_set>

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/base/log.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>

#include "crash_fs.h"
#include "crash_losses.h"
#include "state.h"

namespace lockstep::checkpoint {
namespace {

constexpr int64_t kSteps = 6;
// Saves that fail: one whose shard cannot be synced, and one whose MANIFEST stands already, under its own name, when
// the last sync of all fails.
constexpr int64_t kNoShard = 3, kNoLastSync = 5;

// Steps whose save had begun, and those that it had called durable, once the log had that many operations.
struct Mark {
  size_t operations = 0;
  int64_t attempted = 0;
  std::vector<int64_t> durable = {};
};

// make_state, and a tensor of several pages.
std::vector<StateTensor> state_at(int64_t step, int world_size, int rank) {
  std::vector<StateTensor> state = make_state(Cut::kRows, world_size, rank, static_cast<int>(step));
  ShardLayout layout = ShardLayout::sharded("wide", {5, 450}, "F64", 0, world_size);
  const Box box = layout.boxes[rank];
  const at::Tensor whole = at::arange(2250, at::kDouble).add(step).reshape({5, 450});
  state.push_back({"weights", std::move(layout), whole.narrow(0, box.offsets[0], box.sizes[0]).contiguous()});
  return state;
}

enum class Form { kSynchronous, kInBackground };

bool save(Store& store, Form form, const Progress& progress, const std::vector<StateTensor>& state) {
  if (form == Form::kSynchronous) return store.save(progress, state);
  if (!store.start_save(progress, state)) return false;
  std::optional<SaveResult> result;
  while (!result) result = store.advance_save();
  return result->durable;
}

struct Recording {
  int64_t keep_last;
  CrashFs fs;
  std::vector<Mark> marks = {Mark{}};

  const Mark& mark_at(size_t operations) const {
    return *std::find_if(marks.rbegin(), marks.rend(), [&](const Mark& m) { return m.operations <= operations; });
  }
};

void record_saves(int world_size, Form form, Recording& recording) {
  CrashFs& fs = recording.fs;
  fs.make_directory("/run", 0700);
  fs.sync_directory("/");
  std::mutex mutex;
  const auto mark = [&](int64_t attempted, int64_t durable) {
    const std::lock_guard lock(mutex);
    Mark next = recording.marks.back();
    next.operations = fs.num_operations();
    next.attempted = std::max(next.attempted, attempted);
    if (durable > 0 && (next.durable.empty() || next.durable.back() != durable)) next.durable.push_back(durable);
    recording.marks.push_back(std::move(next));
  };
  const std::string bad_shard =
      "/run/checkpoints/" + format::directory_name(kNoShard, 1) + "/" + format::shard_name(world_size - 1, world_size);
  const std::string bad_manifest = "/run/checkpoints/" + format::directory_name(kNoLastSync, 1) + "/MANIFEST";
  bool manifest_stands = false;
  FaultFs faulty(fs, [&](const std::string& kind, const std::string& path, int64_t) {
    if (kind == "rename" && path == bad_manifest) manifest_stands = true;
    if (kind == "sync" && path == bad_shard) return Fault{.error_number = ENOSPC};
    if (kind == "sync_directory" && path == "/run/checkpoints" && std::exchange(manifest_stands, false))
      return Fault{.error_number = EIO};
    return Fault{};
  });
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    Store store(faulty, group, {.run_dir = "/run", .keep_last = recording.keep_last});
    Progress progress = progress_at(0);
    progress.config_json = R"({"a":")" + std::string(5000, 'a') + R"("})";  // so that a manifest has several pages
    for (progress.step = 1; progress.step <= kSteps; ++progress.step) {
      mark(progress.step, 0);
      group.barrier();
      const bool saved = save(store, form, progress, state_at(progress.step, world_size, group.rank()));
      EXPECT_EQ(saved, progress.step != kNoShard && progress.step != kNoLastSync) << progress.step;
      if (saved) mark(progress.step, progress.step);  // by the first rank that knows: others may still be removing
      group.barrier();
    }
  });
}

// Loads what a power loss has left, into the same tensors each time.
class Survivor {
 public:
  Survivor(ProcessGroup& group, int64_t keep_last) : group_(group), keep_last_(keep_last), state_(state_at(0, 1, 0)) {
    for (int64_t step = 0; step <= kSteps; ++step) expected_.push_back(state_at(step, 1, 0));
  }

  // Empty when all is as promised.
  std::string what_is_wrong(CrashFs& left, const Mark& mark) {
    Options options{.run_dir = "/run", .keep_last = keep_last_, .epoch = 2};
    for (const int64_t step : mark.durable) options.known_durable.emplace(1, step);
    Store store(left, group_, options);
    clear();
    const auto progress = store.load_newest(state_);
    const int64_t acknowledged = mark.durable.empty() ? 0 : mark.durable.back();
    const int64_t loaded = progress ? progress->step : 0;
    if (loaded < acknowledged) return "step " + std::to_string(acknowledged) + " is lost";
    if (loaded > mark.attempted || loaded == kNoShard) return "a step that was never whole";
    if (loaded > 0 && !is_step(loaded)) return "wrong values of the newest step";
    int64_t good = 0;
    for (const auto& candidate : format::list_candidates(left, "/run/checkpoints")) {
      if (!candidate.complete || candidate.quarantined) return candidate.path + " is a wreck";
      clear();
      store.load(candidate.path, state_);
      if (!is_step(candidate.step)) return "wrong values of an older step";
      ++good;
    }
    if (good < std::min(keep_last_, static_cast<int64_t>(mark.durable.size()))) return "too few are kept";
    return store.save(progress_at(9), state_) ? "" : "the run cannot go on";
  }

 private:
  void clear() {
    for (StateTensor& tensor : state_) tensor.local.zero_();
  }
  bool is_step(int64_t step) const {
    const auto& expected = expected_[step];
    return std::equal(state_.begin(), state_.end(), expected.begin(),
                      [](const StateTensor& a, const StateTensor& b) { return at::equal(a.local, b.local); });
  }

  ProcessGroup& group_;
  int64_t keep_last_;
  std::vector<StateTensor> state_;
  std::vector<std::vector<StateTensor>> expected_;  // by step
};

std::string describe(const CrashFs& fs, size_t prefix, const std::vector<CrashFs::Loss>& losses) {
  std::string text = "after operation " + std::to_string(prefix) + " without";
  for (const auto& loss : losses) {
    text += " " + std::to_string(loss.operation) + " (kind " +
            std::to_string(static_cast<int>(fs.operation(loss.operation).kind)) + " of file " +
            std::to_string(fs.operation(loss.operation).inode);
    if (loss.end != CrashFs::kNever)
      text += ", bytes " + std::to_string(loss.begin) + " to " + std::to_string(loss.end);
    text += ")";
  }
  return text;
}

// Which states were seen; a state is the tree and what had been promised by then.
class Seen {
 public:
  bool insert(const std::string& state) {
    const std::lock_guard lock(mutex_);
    return states_.insert(state).second;
  }
  size_t size() const { return states_.size(); }

 private:
  std::mutex mutex_;
  std::unordered_set<std::string> states_;
};

// @return how many different states were loaded.
size_t load_every_state(const Recording& recording, int64_t stride) {
  constexpr size_t kThreads = 2;
  constexpr int kEnough = 5;  // failures that are told
  Seen seen;
  std::atomic<int> failures{0};
  const auto work = [&](ProcessGroup& group, size_t thread) {
    Survivor survivor(group, recording.keep_last);
    for (size_t prefix = 2 + thread; prefix <= recording.fs.num_operations(); prefix += kThreads) {
      const Mark& mark = recording.mark_at(prefix);
      const std::string promised = " " + std::to_string(mark.attempted) + " " + std::to_string(mark.durable.size());
      for_each_loss(recording.fs, prefix, stride, [&](const std::vector<CrashFs::Loss>& losses) {
        if (failures >= kEnough) return;
        const auto left = recording.fs.after_power_loss(prefix, losses);
        if (!seen.insert(left->digest() + promised)) return;
        std::string wrong;
        try {
          wrong = survivor.what_is_wrong(*left, mark);
        } catch (const std::exception& error) {
          wrong = error.what();
        }
        if (wrong.empty()) return;
        ++failures;
        ADD_FAILURE() << wrong << "; " << mark.durable.size() << " were durable, step " << mark.attempted
                      << " was the last begun; " << describe(recording.fs, prefix, losses);
      });
    }
  };
  std::vector<std::jthread> threads;
  for (size_t thread = 0; thread < kThreads; ++thread)
    threads.emplace_back([&, thread] { run_local_ranks(1, [&](ProcessGroup& group) { work(group, thread); }); });
  threads.clear();
  return seen.size();
}

TEST(CrashTest, WhateverAPowerLossLeavesTheAcknowledgedStepOrALaterOneLoads) {
  const bool is_deep = std::getenv("LOCKSTEP_DEEP") != nullptr;
  FLAGS_minloglevel = google::FATAL;  // each load says what it cleans up
  size_t states = 0;
  const auto load_all = [&](int world_size, Form form, int64_t keep_last, int64_t stride) {
    Recording recording{.keep_last = keep_last};
    record_saves(world_size, form, recording);
    const size_t here = load_every_state(recording, stride);
    std::printf("%d ranks%s, %ld kept: %zu operations, %zu different states after a power loss\n", world_size,
                form == Form::kInBackground ? ", in the background" : "", static_cast<long>(keep_last),
                recording.fs.num_operations(), here);
    states += here;
  };
  for (const Form form : {Form::kSynchronous, Form::kInBackground}) {
    if (is_deep) {
      for (const int world_size : {1, 2, 3, 4, 5, 7, 8})
        for (const int64_t keep_last : {2, 3}) load_all(world_size, form, keep_last, 1);
    } else {
      load_all(1, form, 2, 4), load_all(2, form, 2, 16), load_all(4, form, 2, 64);
    }
  }
  FLAGS_minloglevel = google::INFO;
  EXPECT_GE(states, is_deep ? 1'000'000 : 20'000);
}

}  // namespace
}  // namespace lockstep::checkpoint
