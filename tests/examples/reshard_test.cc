// A checkpoint of any layout loads into any other: the state is the same to the bit, and where both layouts compute the
// same bits, so does the training after it. Ranks are threads; the model is the GPT of examples/.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>

#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/base/planted_bug.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>
#include <lockstep/train/trainer.h>

#include "gpt_task.h"

namespace lockstep::train {
namespace {

namespace files = std::filesystem;

constexpr int64_t kSteps = 6, kMiddle = 3;

struct Layout {
  int data = 1, tensor = 1, context = 1, pipeline = 1;
  int zero_stage = 0, zero_shard_size = 0;
  const char* schedule = "1f1b";
  bool sequence_parallel = false;

  int world_size() const { return data * tensor * context * pipeline; }
  // Layouts that agree in these compute the same bits; with all at 1 they are tier A.
  auto arithmetic() const { return std::tuple(tensor, context, sequence_parallel); }
};

std::ostream& operator<<(std::ostream& out, const Layout& layout) {
  return out << "dp" << layout.data << " tp" << layout.tensor << " cp" << layout.context << " pp" << layout.pipeline
             << " " << layout.schedule << " zero" << layout.zero_stage << "/" << layout.zero_shard_size
             << (layout.sequence_parallel ? " sp" : "");
}

using ByWorldSize = std::map<int, std::vector<Layout>>;

const ByWorldSize kTierA = {{1, {Layout{}}},
                            {2, {{.data = 2, .zero_stage = 1}, {.pipeline = 2}, {.data = 2, .zero_stage = 3}}},
                            {3, {{.data = 3, .zero_stage = 2}, {.pipeline = 3, .schedule = "gpipe"}, {.data = 3}}},
                            {4,
                             {{.data = 4, .zero_stage = 3},
                              {.data = 2, .pipeline = 2, .zero_stage = 1, .schedule = "interleaved"},
                              {.data = 4, .zero_stage = 2, .zero_shard_size = 2},
                              {.pipeline = 4}}},
                            {8,
                             {{.data = 8, .zero_stage = 3, .zero_shard_size = 4},
                              {.data = 2, .pipeline = 4, .zero_stage = 2},
                              {.data = 8, .zero_stage = 1},
                              {.data = 4, .pipeline = 2, .zero_stage = 3}}}};

const ByWorldSize kMixed = {
    {1, {Layout{}}},
    {2, {{.tensor = 2}, {.context = 2}, {.tensor = 2, .sequence_parallel = true}}},
    {3, {{.data = 3, .zero_stage = 3}, {.tensor = 3}, {.pipeline = 3}}},
    {4,
     {{.data = 2, .tensor = 2, .zero_stage = 3},
      {.tensor = 2, .pipeline = 2, .schedule = "interleaved"},
      {.data = 2, .context = 2, .zero_stage = 1},
      {.tensor = 2, .context = 2}}},
    {8,
     {{.data = 2, .tensor = 2, .pipeline = 2, .zero_stage = 1},
      {.data = 4, .tensor = 2, .zero_stage = 2, .zero_shard_size = 2, .sequence_parallel = true},
      {.data = 2, .tensor = 2, .context = 2, .zero_stage = 1},
      {.data = 2, .context = 2, .pipeline = 2, .zero_stage = 3}}}};

struct Reshaped : GptTask {
  Reshaped() {
    config_ = gpt::resolve(
        {.layers = 3, .width = 48, .heads = 3, .vocab_size = 61, .sequence_length = kLength, .dropout = 0.1});
  }
};

std::string checkpoint_of(const std::string& run_dir, int64_t step) {
  return run_dir + "/checkpoints/" + format::directory_name(step, 1);
}

// Loss and gradient norm of each step, as text.
std::vector<std::string> figures_of(const std::string& run_dir) {
  std::vector<std::string> figures;
  std::ifstream file(run_dir + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) figures.push_back(line.substr(0, line.find(",\"learning_rate\"")));
  return figures;
}

class ReshardTest : public testing::Test {
 protected:
  ReshardTest() {
    std::string pattern = testing::TempDir() + "/reshard_XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder at " + pattern);
    folder_ = pattern;
  }
  ~ReshardTest() override {
    std::error_code ignored;
    files::remove_all(folder_, ignored);
  }
  ReshardTest(const ReshardTest&) = delete;
  ReshardTest& operator=(const ReshardTest&) = delete;

  // @param from  a checkpoint to go on from; empty: from the start. @return the run's folder.
  std::string train_on(const Layout& layout, const std::string& from) {
    Options options;
    options.run_dir = folder_ + "/run" + std::to_string(runs_++);
    options.steps = kSteps;
    options.global_batch_size = 16;
    options.micro_batch_size = 2;
    options.schedule.learning_rate = 2e-3;
    options.schedule.warmup_steps = 2;
    options.clip_norm = 0.5;
    options.mesh = {
        .pipeline = layout.pipeline, .data = layout.data, .context = layout.context, .tensor = layout.tensor};
    options.zero_stage = layout.zero_stage;
    options.zero_shard_size = layout.zero_shard_size;
    options.pipeline_schedule = layout.schedule;
    options.pipeline_chunks = 0;
    options.sequence_parallel = layout.sequence_parallel;
    options.checkpoint_interval_steps = kMiddle;
    options.eval_interval_steps = 0;
    options.log_interval_steps = 1'000'000;
    options.accept_config_change = {"tensor_parallel_size", "context_parallel_size", "sequence_parallel"};
    if (!from.empty()) options.resume = from;
    run_local_ranks(layout.world_size(), [&](ProcessGroup& group) {
      Reshaped task;
      train(group, at::kCPU, task, options);
    });
    return options.run_dir;
  }

  // The run of a layout from the first step to the last, trained once.
  const std::string& whole_run(const Layout& layout) {
    std::ostringstream name;
    name << layout;
    std::string& run_dir = whole_runs_[name.str()];
    if (run_dir.empty()) run_dir = train_on(layout, "");
    return run_dir;
  }

  static format::CheckpointDigests digests_of(const std::string& run_dir, int64_t step) {
    return format::compute_digests(format::Reader(real_fs(), checkpoint_of(run_dir, step)), {}, 1);
  }

  static void expect_same_state(const format::CheckpointDigests& actual, const format::CheckpointDigests& expected) {
    EXPECT_EQ(actual.weights, expected.weights);
    EXPECT_EQ(actual.optimizer, expected.optimizer);
    EXPECT_EQ(actual.tensors, expected.tensors);
  }

  void expect_resharded(const Layout& from, const Layout& to) {
    std::ostringstream name;
    name << from << "  ->  " << to;
    SCOPED_TRACE(name.str());
    const std::string& whole = whole_run(from);
    const format::CheckpointDigests last = digests_of(whole, kSteps);
    EXPECT_FALSE(last.tensors.empty());
    // A run that is done saves what it came from, in its own layout.
    const std::string moved = train_on(to, checkpoint_of(whole, kSteps));
    expect_same_state(digests_of(moved, kSteps), last);
    files::remove_all(moved);
    if (from.arithmetic() != to.arithmetic()) return;
    const std::string resumed = train_on(to, checkpoint_of(whole, kMiddle));
    expect_same_state(digests_of(resumed, kSteps), last);
    auto figures = figures_of(whole);
    ASSERT_EQ(figures.size(), kSteps);
    figures.erase(figures.begin(), figures.begin() + kMiddle);
    EXPECT_EQ(figures_of(resumed), figures);
    files::remove_all(resumed);
    ++resumed_;
  }

  // Every pair of world sizes, its layouts in turn; all layouts of each with LOCKSTEP_DEEP.
  void expect_all_resharded(const ByWorldSize& layouts) {
    const bool is_deep = std::getenv("LOCKSTEP_DEEP") != nullptr;
    size_t turn = 0, pairs = 0;
    for (const auto& [from_size, from] : layouts) {
      for (const auto& [to_size, to] : layouts) {
        ++turn;
        for (size_t i = 0; i < from.size(); ++i) {
          for (size_t j = 0; j < to.size(); ++j) {
            if (!is_deep && (i != turn % from.size() || j != (turn + turn / 5) % to.size())) continue;
            ASSERT_EQ(from[i].world_size(), from_size);
            ASSERT_EQ(to[j].world_size(), to_size);
            expect_resharded(from[i], to[j]);
            ++pairs;
          }
        }
      }
    }
    EXPECT_GE(pairs, 25U);
    std::printf("%zu pairs of layouts, in %d of them training went on with the same bits\n", pairs, resumed_);
  }

  int resumed_ = 0;
  std::string folder_;

 private:
  int runs_ = 0;
  std::map<std::string, std::string> whole_runs_;
};

TEST_F(ReshardTest, OnLayoutsOfTierAStateIsTheSameAndTrainingGoesOnWithTheBitsOfOneProcess) {
  expect_all_resharded(kTierA);
  const format::CheckpointDigests one = digests_of(whole_run({}), kSteps);
  for (const auto& [world_size, layouts] : kTierA) {
    for (const Layout& layout : layouts) expect_same_state(digests_of(whole_run(layout), kSteps), one);
  }
  EXPECT_GE(resumed_, 25);
}

TEST_F(ReshardTest, WithTensorAndContextParallelismStateIsTheSame) { expect_all_resharded(kMixed); }

// What the tests above go by does tell a state that lacks one tensor, or stands one step off, from the right one.
TEST_F(ReshardTest, ALostTensorAndAStepOffByOneAreNoticed) {
  const Layout layout{.data = 2, .zero_stage = 1};
  const std::string& whole = whole_run(layout);
  const auto last = digests_of(whole, kSteps);
  const auto figures = figures_of(whole);
  {
    const PlantedBug bug("lost_optimizer_tensor");
    EXPECT_NE(digests_of(train_on({}, checkpoint_of(whole, kSteps)), kSteps).optimizer, last.optimizer);
    EXPECT_NE(digests_of(train_on({}, checkpoint_of(whole, kMiddle)), kSteps).weights, last.weights);
  }
  const std::string forged = folder_ + "/forged", manifest_path = forged + "/" + format::kManifestName;
  files::copy(checkpoint_of(whole, kMiddle), forged);
  auto manifest = format::parse_manifest(read_text(real_fs(), manifest_path, format::kMaxManifestBytes), forged);
  ++manifest.step;
  std::ofstream(manifest_path, std::ios::trunc) << format::encode_manifest(manifest);
  const std::string shifted = train_on(layout, forged);
  ASSERT_EQ(figures_of(shifted).size(), kSteps - kMiddle - 1);
  EXPECT_NE(figures_of(shifted).front(), figures[kMiddle + 1]);
  EXPECT_NE(digests_of(shifted, kSteps).weights, last.weights);
}

}  // namespace
}  // namespace lockstep::train
