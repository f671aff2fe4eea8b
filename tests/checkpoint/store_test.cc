#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>
#include <lockstep/format/tensor_file.h>

#include "state.h"
#include "temp_dir.h"

namespace lockstep::checkpoint {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::UnorderedElementsAre;

std::vector<std::string> names_in(const std::string& directory) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

void save_as(const std::string& run_dir, int world_size, Cut cut, int64_t step, int salt, uint64_t epoch = 1) {
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir, .epoch = epoch});
    EXPECT_TRUE(store.save(progress_at(step), make_state(cut, world_size, group.rank(), salt)));
    EXPECT_GT(store.last_save().seconds, 0);
  });
}

void expect_loads(const std::string& run_dir, int world_size, Cut cut, int64_t step, int salt) {
  run_local_ranks(world_size, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir, .epoch = 99});
    const auto state = make_state(cut, world_size, group.rank(), 0, /*filled=*/false);
    const auto progress = store.load_newest(state);
    ASSERT_TRUE(progress.has_value());
    EXPECT_EQ(progress->step, step);
    EXPECT_EQ(progress->samples, 8 * step);
    EXPECT_EQ(progress->config_json, R"({"learning_rate":0.1})");
    EXPECT_EQ(progress->data_fingerprint, "data");
    EXPECT_EQ(first_difference(state, group.rank(), salt), "");
  });
}

class WorldTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, WorldTest, testing::Values(1, 2, 3, 4, 7, 8));

TEST_P(WorldTest, WhatIsSavedInAnyCutIsLoadedInAnyOtherWorldAndCut) {
  std::string weights, optimizer;
  for (const Cut saved : kAllCuts) {
    const TempDir run;
    save_as(run.path(), GetParam(), saved, 10, 5);
    for (const int world_size : {1, 2, 3, 4, 8}) {
      for (const Cut wanted : kAllCuts) expect_loads(run.path(), world_size, wanted, 10, 5);
    }
    const auto digests =
        format::compute_digests(format::Reader(real_fs(), format::resolve_checkpoint(real_fs(), run.path())));
    if (weights.empty()) weights = digests.weights, optimizer = digests.optimizer;
    EXPECT_EQ(digests.weights, weights) << "the digest depends on the layout";
    EXPECT_EQ(digests.optimizer, optimizer);
  }
}

TEST_P(WorldTest, OnlyTheLastOnesAreKeptAndOthersLeaveNothing) {
  const TempDir run;
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path(), .keep_last = 2});
    for (int64_t step = 1; step <= 5; ++step)
      EXPECT_TRUE(store.save(progress_at(step), make_state(Cut::kRows, group.size(), group.rank(), 0)));
  });
  EXPECT_THAT(names_in(run.path() + "/checkpoints"), ElementsAre("step-00000004.e0001", "step-00000005.e0001"));
}

TEST_P(WorldTest, TheManifestVouchesForEveryShardWhereThatIsAskedFor) {
  for (const bool asked : {true, false}) {
    const TempDir run;
    run_local_ranks(GetParam(), [&](ProcessGroup& group) {
      Store store(real_fs(), group, {.run_dir = run.path(), .sha256 = asked});
      EXPECT_TRUE(store.save(progress_at(1), make_state(Cut::kRows, group.size(), group.rank(), 1)));
      EXPECT_TRUE(store.start_save(progress_at(2), make_state(Cut::kReplicatedRows, group.size(), group.rank(), 2)));
      while (!store.advance_save()) {
      }
    });
    for (const int64_t step : {1, 2}) {
      const std::string path = run.path() + "/checkpoints/" + format::directory_name(step, 1);
      format::Authenticity authenticity{.expected = format::Reader(real_fs(), path).manifest_sha256()};
      const auto problems = format::verify(real_fs(), path, {}, 1, &authenticity);
      EXPECT_EQ(problems.empty(), asked) << "step " << step << ": " << testing::PrintToString(problems);
    }
  }
}

TEST_P(WorldTest, ADamagedNewestIsQuarantinedAndTheOneBeforeIsLoaded) {
  const TempDir run;
  save_as(run.path(), GetParam(), Cut::kRows, 1, 1);
  save_as(run.path(), GetParam(), Cut::kRows, 2, 2);
  const std::string newest = run.path() + "/checkpoints/step-00000002.e0001";
  const std::string shard = newest + "/" + format::shard_name(GetParam() > 1 ? 1 : 0, GetParam());
  std::filesystem::resize_file(shard, std::filesystem::file_size(shard) - 1);
  expect_loads(run.path(), GetParam(), Cut::kRows, 1, 1);
  EXPECT_TRUE(std::filesystem::exists(newest + "/QUARANTINED"));
  save_as(run.path(), GetParam(), Cut::kRows, 2, 3, /*epoch=*/2);  // goes on from there, without touching the evidence
  expect_loads(run.path(), 1, Cut::kReplicated, 2, 3);
  EXPECT_TRUE(std::filesystem::exists(shard));
}

// The order of the calls is the promise: data is on disk before the manifest is, the manifest before its name, the name
// before "durable" is said, and nothing old goes before that.
TEST(StoreTest, TheCallsOfASaveComeInTheOrderThatSurvivesAPowerLoss) {
  const TempDir run;
  save_as(run.path(), 1, Cut::kReplicated, 1, 0);
  save_as(run.path(), 1, Cut::kReplicated, 2, 0);
  FaultFs recording(real_fs(), [](const std::string&, const std::string&, int64_t) { return Fault{}; });
  run_local_ranks(1, [&](ProcessGroup& group) {
    Store store(recording, group, {.run_dir = run.path(), .keep_last = 2});
    EXPECT_TRUE(store.save(progress_at(3), make_state(Cut::kReplicated, 1, 0, 0)));
  });
  std::vector<std::string> calls;  // "kind last-part-of-path", without reads and extents
  for (const std::string& line : recording.log()) {
    std::istringstream words(line);
    std::string kind, path;
    words >> kind >> path;
    const std::string call = kind + " " + std::filesystem::path(path).filename().string();
    if (kind != "read" && kind != "list" && (calls.empty() || calls.back() != call)) calls.push_back(call);
  }
  const std::string shard = format::shard_name(0, 1), folder = "step-00000003.e0001",
                    old = "step-00000001.e0001.retired";
  EXPECT_THAT(calls, ElementsAre("mkdir " + folder, "sync_directory checkpoints", "open " + shard, "allocate " + shard,
                                 "write " + shard, "sync " + shard, "close " + shard, "sync_directory " + folder,
                                 "open " + shard, "open MANIFEST.tmp", "write MANIFEST.tmp", "sync MANIFEST.tmp",
                                 "close MANIFEST.tmp", "sync_directory " + folder, "rename MANIFEST",
                                 "sync_directory " + folder, "sync_directory checkpoints", "rename " + old,
                                 "sync_directory checkpoints", "unlink MANIFEST", "sync_directory " + old,
                                 "unlink " + shard, "rmdir " + old));
}

// Every rank opens every shard; but a chunk that several ranks of the machine want is read by one of them.
TEST_P(WorldTest, AMachineReadsNoByteTwice) {
  for (const Cut saved : kAllCuts) {
    for (const Cut wanted : kAllCuts) {
      const TempDir run;
      save_as(run.path(), 3, saved, 1, 5);
      std::map<std::string, std::multiset<int64_t>> offsets;  // by file, of what is read behind the header
      FaultFs fs(real_fs(), [](const std::string&, const std::string&, int64_t) { return Fault{}; });
      run_local_ranks(GetParam(), [&](ProcessGroup& group) {
        Store store(fs, group, {.run_dir = run.path()});
        const auto state = make_state(wanted, GetParam(), group.rank(), 0, /*filled=*/false);
        EXPECT_TRUE(store.load_newest(state).has_value());
        EXPECT_EQ(first_difference(state, group.rank(), 5), "");
      });
      for (const std::string& line : fs.log()) {
        std::istringstream words(line);
        std::string kind, path;
        int64_t offset = 0;
        words >> kind >> path >> offset;
        if (kind == "read" && path.ends_with(".safetensors")) offsets[path].insert(offset);
      }
      EXPECT_FALSE(offsets.empty());
      for (auto& [path, reads] : offsets) {
        const auto file = real_fs().open_read(path);
        const auto head = static_cast<int64_t>(format::read_header(*file, path).data_start);
        for (const int64_t offset : reads)
          EXPECT_TRUE(offset < head || reads.count(offset) == 1) << path << " " << offset;
      }
    }
  }
}

// Larger than a chunk and than a window of the exchange, cut so that no border is a chunk's.
TEST(StoreTest, LargeTensorsArriveInAnyCut) {
  const std::vector<int64_t> shape = {9001, 2503};  // 86 MiB
  const at::Tensor whole = at::arange(shape[0] * shape[1], at::kInt).reshape(shape);
  const auto make = [&](int dim, int world_size, int rank) {
    ShardLayout layout = dim < 0 ? ShardLayout::replicated("large", shape, "I32", world_size)
                                 : ShardLayout::sharded("large", shape, "I32", dim, world_size);
    const Box box = layout.boxes[rank];
    const at::Tensor part = whole.narrow(0, box.offsets[0], box.sizes[0]).narrow(1, box.offsets[1], box.sizes[1]);
    return std::pair(StateTensor{"weights", std::move(layout), at::zeros_like(part.contiguous())}, part);
  };
  for (const int saved_dim : {-1, 0, 1}) {
    const TempDir run;
    run_local_ranks(3, [&](ProcessGroup& group) {
      auto [tensor, part] = make(saved_dim, 3, group.rank());
      tensor.local.copy_(part);
      EXPECT_TRUE(Store(real_fs(), group, {.run_dir = run.path()}).save(progress_at(1), {tensor}));
    });
    for (const int wanted_dim : {-1, 0, 1}) {
      run_local_ranks(2, [&](ProcessGroup& group) {
        const auto [tensor, part] = make(wanted_dim, 2, group.rank());
        Store store(real_fs(), group, {.run_dir = run.path(), .read_threads = 2});
        ASSERT_TRUE(store.load_newest({tensor}).has_value());
        EXPECT_TRUE(at::equal(tensor.local, part)) << saved_dim << " -> " << wanted_dim;
      });
    }
  }
}

TEST(StoreTest, RanksThatPlanOtherwiseAreNamed) {
  const TempDir run;
  run_local_ranks(3, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path(), .check_plan = true});
    EXPECT_TRUE(store.save(progress_at(1), make_state(Cut::kRows, 3, group.rank(), 1)));
    auto state = make_state(Cut::kReplicated, 3, group.rank(), 1);
    if (group.rank() == 2) std::swap(state[0], state[1]);
    try {
      store.save(progress_at(2), state);
      ADD_FAILURE() << "not found";
    } catch (const CheckFailed& error) {
      EXPECT_THAT(error.what(), HasSubstr("rank 2 plans another checkpoint than rank 0"));
    }
  });
}

TEST(StoreTest, AnEmptyRunLoadsNothing) {
  const TempDir run;
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    EXPECT_FALSE(store.load_newest(make_state(Cut::kRows, 2, group.rank(), 0)).has_value());
  });
}

TEST(StoreTest, WhenAllAreDamagedItIsCorruptDataAndNeverAFreshStart) {
  const TempDir run;
  for (const int64_t step : {1, 2}) {
    save_as(run.path(), 2, Cut::kRows, step, 0);
    std::ofstream(run.path() + "/checkpoints/" + format::directory_name(step, 1) + "/MANIFEST", std::ios::app) << "x";
  }
  for (int again = 0; again < 2; ++again) {  // the second time all are in quarantine already
    run_local_ranks(2, [&](ProcessGroup& group) {
      Store store(real_fs(), group, {.run_dir = run.path(), .epoch = 2});
      try {
        store.load_newest(make_state(Cut::kRows, 2, group.rank(), 0));
        ADD_FAILURE() << "loaded from nothing good";
      } catch (const CorruptData& error) {
        EXPECT_THAT(error.what(), HasSubstr("Mend:"));
        EXPECT_THAT(error.what(), HasSubstr(again ? "quarantine" : "fails its checksum"));
      }
    });
  }
}

TEST(StoreTest, UnfinishedFoldersOfEarlierStartsAreRemovedButNotThoseOfALaterOne) {
  const TempDir run;
  save_as(run.path(), 1, Cut::kReplicated, 1, 0);
  const std::string checkpoints = run.path() + "/checkpoints";
  for (const char* name : {"/step-00000002.e0001", "/step-00000002.e0007", "/step-00000000.e0001.retired"}) {
    std::filesystem::create_directory(checkpoints + name);
    std::ofstream(checkpoints + name + "/shard-00001-model-00001-of-00001.safetensors") << "half";
  }
  run_local_ranks(1, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path(), .epoch = 2});
    EXPECT_EQ(store.load_newest(make_state(Cut::kReplicated, 1, 0, 0))->step, 1);
  });
  EXPECT_THAT(names_in(checkpoints), UnorderedElementsAre("step-00000001.e0001", "step-00000002.e0007"));
}

TEST(StoreTest, AnotherModelIsRefusedWithEveryDifference) {
  const TempDir run;
  save_as(run.path(), 1, Cut::kReplicated, 1, 0);
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    auto state = make_state(Cut::kReplicated, 2, group.rank(), 0);
    state[0].layout.name = "renamed.weight";
    state[2].layout = ShardLayout::replicated("head.bias", {8}, "F32", 2);
    state[2].local = at::Tensor(state[2].local).new_zeros({8});
    try {
      store.load_newest(state);
      ADD_FAILURE() << "another model was loaded";
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr("weights renamed.weight is not in the checkpoint"));
      EXPECT_THAT(error.what(), HasSubstr("weights head.bias: F32 [7] in the checkpoint, F32 [8] in the model"));
    }
  });
  EXPECT_THAT(names_in(run.path() + "/checkpoints/step-00000001.e0001"),
              testing::Not(testing::Contains("QUARANTINED")));
}

TEST(StoreTest, WeightsAloneLeaveTheOptimizerAsItIs) {
  const TempDir run;
  save_as(run.path(), 2, Cut::kRows, 1, 4);
  run_local_ranks(1, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path() + "/other"});
    const auto state = make_state(Cut::kReplicated, 1, 0, 0, /*filled=*/false);
    store.load(run.path(), state, /*weights_only=*/true);
    EXPECT_THAT(first_difference(state, 0, 4), HasSubstr("exp_avg"));
    EXPECT_EQ(state[6].local.abs().sum().item<float>(), 0);
    EXPECT_NE(state[5].local.item<int64_t>(), 0) << "buffers belong to the model";
  });
}

TEST(StoreTest, LoadingByPathTakesWhatWasAskedForOrNothing) {
  const TempDir run;
  save_as(run.path(), 2, Cut::kRows, 1, 1);
  save_as(run.path(), 2, Cut::kRows, 2, 2);
  const std::string older = run.path() + "/checkpoints/step-00000001.e0001";
  run_local_ranks(3, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    const auto state = make_state(Cut::kColumns, 3, group.rank(), 0, /*filled=*/false);
    EXPECT_EQ(store.load(older, state).step, 1);
    EXPECT_EQ(first_difference(state, group.rank(), 1), "");
    EXPECT_THROW(store.load(run.path() + "/nowhere", state), ConfigError);
  });
  std::filesystem::remove(older + "/" + format::shard_name(0, 2));
  run_local_ranks(3, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    EXPECT_THROW(store.load(older, make_state(Cut::kColumns, 3, group.rank(), 0)), CorruptData);
  });
}

TEST(StoreTest, SavingTheSameStepAgainLeavesTheFirstAsItWas) {
  const TempDir run;
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    EXPECT_TRUE(store.save(progress_at(1), make_state(Cut::kRows, 2, group.rank(), 1)));
    EXPECT_FALSE(store.save(progress_at(1), make_state(Cut::kRows, 2, group.rank(), 2)));
  });
  expect_loads(run.path(), 1, Cut::kReplicated, 1, 1);
}

TEST(StoreTest, AStartThatWasSupersededStopsOnEveryRankAndWritesNothing) {
  const TempDir run;
  run_local_ranks(3, [&](ProcessGroup& group) {
    const uint64_t epoch = acquire_epoch(real_fs(), group, run.path(), /*take_over=*/false);
    EXPECT_EQ(epoch, 1U);
    Store old_store(real_fs(), group, {.run_dir = run.path(), .epoch = epoch});
    const auto state = make_state(Cut::kRows, 3, group.rank(), 1);
    EXPECT_TRUE(old_store.save(progress_at(1), state));
    const uint64_t newer = acquire_epoch(real_fs(), group, run.path(), /*take_over=*/true);
    EXPECT_EQ(newer, 2U);
    EXPECT_THROW(old_store.save(progress_at(2), state), Fenced);
    Store new_store(real_fs(), group, {.run_dir = run.path(), .epoch = newer});
    EXPECT_EQ(new_store.load_newest(state)->step, 1);
    EXPECT_TRUE(new_store.save(progress_at(2), state));
  });
  EXPECT_THAT(names_in(run.path() + "/checkpoints"), ElementsAre("step-00000001.e0001", "step-00000002.e0002"));
}

TEST(StoreTest, AStartThatIsSupersededWhileItWritesIsStoppedBeforeTheManifest) {
  const TempDir run;
  bool renamed = false;
  FaultFs usurped(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    renamed |= kind == "rename";
    if (kind == "allocate" && path.ends_with("safetensors"))
      write_durable(real_fs(), run.path() + "/epoch/2", "{}");  // a newer start comes in just now
    return Fault{};
  });
  run_local_ranks(1, [&](ProcessGroup& group) {
    const uint64_t epoch = acquire_epoch(real_fs(), group, run.path(), false);
    Store store(usurped, group, {.run_dir = run.path(), .epoch = epoch});
    EXPECT_THROW(store.save(progress_at(1), make_state(Cut::kRows, 1, 0, 1)), Fenced);
  });
  EXPECT_FALSE(renamed);
  EXPECT_TRUE(names_in(run.path() + "/checkpoints").empty());
}

// While it loads, the newer one goes on and retires what it reads.
TEST(StoreTest, AStartThatIsSupersededWhileItLoadsSaysSoAndMarksNothing) {
  const TempDir run;
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store(real_fs(), group, {.run_dir = run.path()}).save(progress_at(1), make_state(Cut::kRows, 2, group.rank(), 1));
  });
  const std::string checkpoint = run.path() + "/checkpoints/" + format::directory_name(1, 1);
  bool superseded = false;
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    if (kind == "open" && path.find("shard-") != std::string::npos && !std::exchange(superseded, true)) {
      for (int epoch = 1; epoch <= 3; ++epoch) format::create_epoch(real_fs(), run.path(), {.take_over = true});
      for (const auto& file : std::filesystem::directory_iterator(checkpoint)) std::filesystem::remove(file);
    }
    return Fault{};
  });
  run_local_ranks(2, [&](ProcessGroup& group) {
    Store store(fs, group, {.run_dir = run.path(), .epoch = 2});
    const auto state = make_state(Cut::kRows, 2, group.rank(), 0, /*filled=*/false);
    EXPECT_THROW(store.load_newest(state), Fenced);
  });
  EXPECT_TRUE(superseded);
  EXPECT_TRUE(std::filesystem::is_empty(checkpoint)) << "put in quarantine";
}

TEST(StoreTest, TensorsThatDoNotFitTheirLayoutAreABugNotAFile) {
  const TempDir run;
  run_local_ranks(1, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    const auto broken = [&](const std::function<void(std::vector<StateTensor>&)>& spoil) {
      auto state = make_state(Cut::kReplicated, 1, 0, 0);
      spoil(state);
      EXPECT_THROW(store.save(progress_at(1), state), CheckFailed);
    };
    broken([](auto& state) { state[0].local = state[0].local.narrow(0, 0, 3); });
    broken([](auto& state) { state[0].local = state[0].local.to(at::kDouble); });
    broken([](auto& state) { state[1].layout.name = state[0].layout.name; });
    broken([](auto& state) { state[0].layout.name = "with:colon"; });
    broken([](auto& state) { state[0].layout.boxes.clear(); });
    broken([](auto& state) { state[0].layout.boxes[0].offsets[0] = 1; });
  });
  EXPECT_FALSE(std::filesystem::exists(run.path() + "/checkpoints"));
}

TEST(StoreTest, StridedTensorsAreSavedAndLoadedByValue) {
  const TempDir run;
  run_local_ranks(1, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run.path()});
    auto state = make_state(Cut::kReplicated, 1, 0, 3);
    state[0].local = state[0].local.t().contiguous().t();
    EXPECT_TRUE(store.save(progress_at(1), state));
    state[0].local.zero_();
    store.load_newest(state);
    EXPECT_EQ(first_difference(state, 0, 3), "");
  });
}

}  // namespace
}  // namespace lockstep::checkpoint
