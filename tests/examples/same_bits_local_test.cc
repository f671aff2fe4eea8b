// The promise of same_bits_test.py on the reference back end: ranks as threads of one process. The models are the
// examples' own; the data is made on the spot.
#include <filesystem>
#include <fstream>
#include <mutex>

#include <gtest/gtest.h>
#include <torch/nn/module.h>
#include <torch/types.h>

#include <lockstep/collectives/local_group.h>
#include <lockstep/nn/functions.h>
#include <lockstep/train/trainer.h>

#include "../../examples/image_classification/model.h"
#include "gpt_task.h"

namespace lockstep::train {
namespace {

constexpr int kSteps = 40;

class MixtureTask : public GptTask {
 public:
  MixtureTask() {
    config_ = gpt::resolve({.family = "llama",
                            .layers = 2,
                            .width = 48,
                            .heads = 3,
                            .ffn_width = 32,
                            .vocab_size = 61,
                            .sequence_length = kLength,
                            .experts = 4,
                            .moe_aux_weight = 0.05});
  }
  std::shared_ptr<const data::Dataset> validation_data() override { return training_data(); }
};

class VitTask : public Task {
 public:
  std::string name() const override { return "vit"; }
  std::shared_ptr<torch::nn::Module> make_model() override {
    return image::make_classifier({.family = "vit", .model_width = 48, .layers = 2, .heads = 3});
  }
  void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed) override {
    image::initialize(name, parameter, seed);
  }
  std::shared_ptr<const data::Dataset> training_data() override {
    return std::make_shared<MadeUp>([](std::span<const int64_t> indices) {
      const auto samples = static_cast<int64_t>(indices.size());
      data::Batch batch{{at::empty({samples, 1, 28, 28}), at::empty({samples}, at::kLong)}, samples};
      for (int64_t i = 0; i < samples; ++i) {
        const int64_t label = indices[i] % 10;
        batch.tensors[1][i] = label;
        auto* pixels = batch.tensors[0][i].data_ptr<float>();
        for (int64_t p = 0; p < 784; ++p) pixels[p] = 0.3F * noise(indices[i], p) + (p / 28 / 3 == label ? 0.7F : 0);
      }
      return batch;
    });
  }
  int64_t count(const data::Batch& batch) override { return batch.valid_samples; }
  LossSum loss(torch::nn::Module& model, const data::Batch& batch) override {
    const at::Tensor logits = dynamic_cast<image::Classifier&>(model).logits(batch.tensors[0]);
    return {nn::cross_entropy_sum(logits, batch.tensors[1]), logits.argmax(1).eq(batch.tensors[1]).sum()};
  }
};

// What a run leaves: all its loss lines as text, the last one of its validation, and the bytes of its final weights by
// name.
struct Outcome {
  std::vector<std::string> losses;
  std::string validation_loss;
  std::map<std::string, std::string> weights;
};

// A layout of tier A: ranks, and what else of the options says how the run is cut.
struct Layout {
  int world_size = 1;
  std::function<void(Options&)> set = [](Options&) {};
  std::string name;
};

Layout buckets(int world_size, int64_t bytes) {
  return {world_size, [=](Options& options) { options.bucket_bytes = bytes; },
          std::to_string(world_size) + " ranks, buckets of " + std::to_string(bytes) + " bytes"};
}

Layout sharded(int world_size, int zero_stage, int shard_size = 0, Recompute recompute = Recompute::kNone) {
  return {world_size,
          [=](Options& options) {
            options.zero_stage = zero_stage;
            options.zero_shard_size = shard_size;
            options.recompute = recompute;
          },
          std::to_string(world_size) + " ranks, ZeRO " + std::to_string(zero_stage) + " over " +
              std::to_string(shard_size) + ", recompute " + std::to_string(static_cast<int>(recompute))};
}

Layout pipelined(int world_size, int stages, const std::string& schedule, int zero_stage) {
  return {world_size,
          [=](Options& options) {
            options.mesh.pipeline = stages;
            options.pipeline_schedule = schedule;
            options.pipeline_chunks = schedule == "interleaved" ? 2 : 1;
            options.zero_stage = zero_stage;
          },
          std::to_string(world_size) + " ranks, " + std::to_string(stages) + " stages, " + schedule + ", ZeRO " +
              std::to_string(zero_stage)};
}

// Experts shared by ranks of the data axis.
Layout shared(int world_size, int experts, const Layout& other = {}) {
  return {world_size,
          [experts, set = other.set](Options& options) {
            set(options);
            options.mesh.expert = experts;
          },
          std::to_string(world_size) + " ranks, experts shared by " + std::to_string(experts) + ", " + other.name};
}

template <typename TaskType>
Outcome train_on(const Layout& layout) {
  const std::filesystem::path run_dir = testing::TempDir() + "/same_bits_" + std::to_string(getpid());
  std::filesystem::remove_all(run_dir);
  Options options;
  options.run_dir = run_dir;
  options.steps = kSteps;
  options.global_batch_size = 24;
  options.micro_batch_size = 3;  // eight micro-batches: uneven shares on 3 and 5 ranks
  options.schedule.learning_rate = 2e-3;
  options.schedule.warmup_steps = 5;
  options.checkpoint_interval_steps = 0;
  options.eval_interval_steps = 0;
  options.eval_samples = 15;  // five micro-batches
  options.log_interval_steps = 1000;
  layout.set(options);
  Outcome outcome;
  run_local_ranks(layout.world_size, [&](ProcessGroup& group) {
    // The Trainer hands its model to finished() on rank 0 alone: the only thread that writes here.
    struct Keeping : TaskType {
      Outcome* outcome;
      bool wants_finished_model() const override { return true; }
      void finished(torch::nn::Module& model) override {
        for (const auto& item : model.named_parameters()) {
          const at::Tensor values = item.value().detach().contiguous();
          outcome->weights[item.key()] =
              std::string(static_cast<const char*>(values.const_data_ptr()), values.nbytes());
        }
      }
    } task;
    task.outcome = &outcome;
    const Result result = train(group, at::kCPU, task, options);
    if (group.rank() == 0) outcome.validation_loss = std::to_string(result.validation_loss);
  });
  std::ifstream file(run_dir / "metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const size_t begin = line.find("\"loss\":"), end = line.find(",\"learning_rate\"");  // loss and gradient norm
    outcome.losses.push_back(line.substr(begin, end - begin));
  }
  std::filesystem::remove_all(run_dir);
  return outcome;
}

template <typename TaskType>
void expect_same_bits_on(const std::vector<Layout>& layouts, const Layout& first = {}) {
  const Outcome one = train_on<TaskType>(first);
  ASSERT_EQ(one.losses.size(), kSteps);
  ASSERT_FALSE(one.weights.empty());
  for (const Layout& layout : layouts) {
    SCOPED_TRACE(layout.name);
    const Outcome other = train_on<TaskType>(layout);
    EXPECT_EQ(other.losses, one.losses);
    EXPECT_EQ(other.validation_loss, one.validation_loss);
    EXPECT_EQ(other.weights.size(), one.weights.size());
    for (const auto& [name, bytes] : one.weights) EXPECT_TRUE(other.weights.at(name) == bytes) << name;
  }
}

const std::vector<Layout> kDataParallel = {buckets(2, 25 << 20), buckets(3, 25 << 20),        buckets(4, 25 << 20),
                                           buckets(5, 25 << 20), buckets(8, 25 << 20),        buckets(3, 1 << 10),
                                           buckets(3, 1 << 20),  buckets(3, int64_t{1} << 40)};
const std::vector<Layout> kSharded = {sharded(2, 1),    sharded(3, 2, 0, Recompute::kFull),
                                      sharded(5, 3),    sharded(4, 3, 2, Recompute::kSelective),
                                      sharded(6, 1, 3), sharded(8, 2, 4)};

TEST(SameBitsLocalTest, GptTrainsToTheSameBitsOnAnyNumberOfRanksAndInAnyBuckets) {
  expect_same_bits_on<GptTask>(kDataParallel);
}

TEST(SameBitsLocalTest, VitTrainsToTheSameBitsOnAnyNumberOfRanksAndInAnyBuckets) {
  expect_same_bits_on<VitTask>(kDataParallel);
}

TEST(SameBitsLocalTest, GptTrainsToTheSameBitsShardedAndRecomputed) { expect_same_bits_on<GptTask>(kSharded); }

TEST(SameBitsLocalTest, VitTrainsToTheSameBitsSharded) { expect_same_bits_on<VitTask>(kSharded); }

TEST(SameBitsLocalTest, GptTrainsToTheSameBitsInPipelines) {
  expect_same_bits_on<GptTask>({pipelined(2, 2, "1f1b", 0), pipelined(4, 2, "gpipe", 3),
                                pipelined(6, 2, "interleaved", 2), pipelined(6, 2, "interleaved", 3),
                                pipelined(4, 4, "1f1b", 1)});
}

TEST(SameBitsLocalTest, AMixtureOfExpertsTrainsToTheSameBitsOnEveryLayout) {
  expect_same_bits_on<MixtureTask>({buckets(2, 25 << 20), buckets(3, 1 << 14), buckets(5, 25 << 20),
                                    buckets(8, 25 << 20), sharded(2, 1), sharded(3, 2, 0, Recompute::kFull),
                                    sharded(4, 3, 2, Recompute::kSelective), pipelined(4, 2, "gpipe", 3),
                                    pipelined(6, 2, "interleaved", 0)});
}

// Five micro-batches of validation: on two and four ranks some have none in the last round.
TEST(SameBitsLocalTest, ExpertsSharedByRanksTrainToTheSameBits) {
  expect_same_bits_on<MixtureTask>({shared(2, 2), shared(4, 4), shared(8, 2), shared(4, 2, sharded(4, 1)),
                                    shared(4, 2, sharded(4, 1, 2, Recompute::kFull)),
                                    shared(4, 2, pipelined(4, 2, "1f1b", 1)),
                                    shared(4, 2, pipelined(4, 2, "interleaved", 0))});
}

// Which change bits themselves, but not more where experts are shared.
TEST(SameBitsLocalTest, ExpertsSharedByRanksTrainToTheSameBitsUnderSequenceAndContextParallelism) {
  const Layout by_sequence{4,
                           [](Options& options) {
                             options.mesh.tensor = 2;
                             options.sequence_parallel = true;
                           },
                           "sequence parallel"};
  const Layout by_context{4, [](Options& options) { options.mesh.context = 2; }, "context parallel"};
  for (const Layout& layout : {by_sequence, by_context})
    expect_same_bits_on<MixtureTask>({shared(4, 2, layout)}, layout);
}

}  // namespace
}  // namespace lockstep::train
