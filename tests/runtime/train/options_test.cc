#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/train/options.h>

namespace lockstep::train {
namespace {

using testing::AllOf;
using testing::HasSubstr;

TEST(OptionsTest, TheMicroBatchIsAnEighthOfTheGlobalBatchWhereThatDivides) {
  const auto derived = [](int64_t global) {
    Options options;
    options.global_batch_size = global;
    return resolve(options, 1).micro_batch_size;
  };
  EXPECT_EQ(derived(32), 4);
  EXPECT_EQ(derived(1), 1);
  EXPECT_EQ(derived(7), 1);
  EXPECT_EQ(derived(30), 3);
  EXPECT_EQ(derived(44), 4);  // 5 does not divide
}

TEST(OptionsTest, WhatDoesNotWorkOutPrintsBothSidesAndTheMend) {
  const auto refusal = [](const std::function<void(Options&)>& change, int world_size = 1) -> std::string {
    Options options;
    change(options);
    try {
      resolve(options, world_size);
      return "not refused";
    } catch (const ConfigError& error) {
      return error.what();
    }
  };
  EXPECT_EQ(refusal([](Options&) {}), "not refused");
  EXPECT_THAT(refusal([](Options& o) { o.share = "all"; }), HasSubstr("--share=all"));
  EXPECT_THAT(refusal([](Options& o) { o.global_batch_size = 30, o.micro_batch_size = 4; }),
              AllOf(HasSubstr("--global_batch_size=30"), HasSubstr("--micro_batch_size=4"), HasSubstr("=32")));
  EXPECT_THAT(refusal([](Options& o) { o.global_batch_size = 6, o.micro_batch_size = 2; }, 4),
              AllOf(HasSubstr("3 micro-batches of 2"), HasSubstr("size 4"), HasSubstr("--global_batch_size=8")));
  EXPECT_THAT(refusal([](Options& o) { o.mesh.data = 3; }, 4), AllOf(HasSubstr("3"), HasSubstr("4")));
  EXPECT_THAT(refusal([](Options& o) { o.steps = 0; }), HasSubstr("--steps=0"));
  EXPECT_THAT(refusal([](Options& o) { o.global_batch_size = -1; }), HasSubstr("--global_batch_size=-1"));
  EXPECT_THAT(refusal([](Options& o) { o.micro_batch_size = -1; }), HasSubstr("--micro_batch_size=-1"));
  EXPECT_THAT(refusal([](Options& o) { o.threads_per_rank = 0; }), HasSubstr("--threads_per_rank=0"));
  EXPECT_THAT(refusal([](Options& o) { o.keep_checkpoints = 1; }), HasSubstr("fall back"));
  EXPECT_THAT(refusal([](Options& o) { o.zero_stage = 1, o.zero_shard_size = -1; }), HasSubstr("--zero_shard_size=-1"));
  EXPECT_THAT(refusal([](Options& o) { o.bucket_bytes = 0; }), HasSubstr("--bucket_bytes=0"));
  EXPECT_THAT(refusal([](Options& o) { o.parallel_micro_batches = -1; }), HasSubstr("--parallel_micro_batches=-1"));
  EXPECT_THAT(refusal([](Options& o) { o.eval_samples = 0; }), HasSubstr("--eval_samples=-1"));
  EXPECT_THAT(refusal([](Options& o) { o.runtime.collective_timeout = {}; }), HasSubstr("--collective_timeout_s"));
  for (const double wrong : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_THAT(refusal([=](Options& o) { o.schedule.learning_rate = wrong; }), HasSubstr("--learning_rate="));
    EXPECT_THAT(refusal([=](Options& o) { o.weight_decay = wrong; }), HasSubstr("--weight_decay="));
    EXPECT_THAT(refusal([=](Options& o) { o.clip_norm = wrong; }), HasSubstr("--clip_norm="));
    EXPECT_THAT(refusal([=](Options& o) { o.schedule.decay_fraction = wrong; }), HasSubstr("--decay_fraction="));
  }
  EXPECT_THAT(refusal([](Options& o) { o.precision = "fp16"; }), HasSubstr("neither fp32 nor bf16"));
  EXPECT_THAT(refusal([](Options& o) { o.reduction = "best"; }), HasSubstr("neither ordered nor fast"));
  EXPECT_THAT(refusal([](Options& o) { o.schedule.kind = "sine"; }), HasSubstr("sine"));
  EXPECT_THAT(refusal([](Options& o) { o.run_dir = ""; }), HasSubstr("--run_dir"));
  EXPECT_THAT(refusal([](Options& o) { o.metrics_port = 65'536; }), HasSubstr("--metrics_port=65536"));
  EXPECT_THAT(refusal([](Options& o) { o.metrics_bind = "localhost"; }),
              AllOf(HasSubstr("--metrics_bind=localhost"), HasSubstr("127.0.0.1")));
  EXPECT_THAT(refusal([](Options& o) { o.metrics_textfile = "run"; }), HasSubstr("--metrics_textfile=run.prom"));
  EXPECT_THAT(refusal([](Options& o) { o.mesh.expert = 2, o.global_batch_size = 10, o.micro_batch_size = 1; }, 4),
              AllOf(HasSubstr("10 micro-batches"), HasSubstr("size 4"), HasSubstr("--global_batch_size=12")));
  EXPECT_THAT(refusal([](Options& o) { o.mesh.expert = 2, o.zero_stage = 2; }, 4), HasSubstr("--zero_stage=1"));
  EXPECT_THAT(refusal([](Options& o) { o.mesh.expert = 4, o.zero_stage = 1, o.zero_shard_size = 2; }, 4),
              HasSubstr("--zero_shard_size=2 is no multiple of --expert_parallel_size=4"));
  EXPECT_THAT(refusal([](Options& o) { o.mesh.expert = 3; }, 4), HasSubstr("does not divide data-parallel size 4"));
}

TEST(OptionsTest, TheConfigurationOfARunIsWhatDecidesItsBits) {
  const Options plain = resolve({}, 1);
  const auto changes = [&](const std::function<void(Options&)>& change, int world_size = 1) {
    Options options = plain;
    change(options);
    options.mesh = {};
    return config_json(resolve(options, world_size), "{}") != config_json(plain, "{}");
  };
  EXPECT_TRUE(changes([](Options& o) { o.seed = 2; }));
  EXPECT_TRUE(changes([](Options& o) { o.micro_batch_size = 2; }));
  EXPECT_TRUE(changes([](Options& o) { o.threads_per_rank = 2; }));
  EXPECT_TRUE(changes([](Options& o) { o.precision = "bf16"; }));
  EXPECT_TRUE(changes([](Options& o) { o.schedule.learning_rate = 1; }));
  EXPECT_FALSE(changes([](Options& o) { o.bucket_bytes = 1; }));
  EXPECT_FALSE(changes([](Options& o) { o.checkpoint_interval_steps = 1; }));
  EXPECT_FALSE(changes([](Options& o) { o.parallel_micro_batches = 3; }));
  EXPECT_FALSE(changes([](Options&) {}, 8));
  EXPECT_EQ(nlohmann::json::parse(config_json(plain, R"({"layers": 3})")).at("task.layers"), 3);
}

}  // namespace
}  // namespace lockstep::train
