// Micro-batches summed before uses: the sum of each use by the canonical tree, then first + second.
#include <mutex>

#include <gmock/gmock.h>

#include <lockstep/base/error.h>
#include <lockstep/sharding/gradient_reducer.h>
#include <lockstep/sharding/tied.h>

#include "pipeline_model.h"

namespace lockstep {
namespace {

using test::Record;
using test::StackModel;

constexpr int64_t kMicroBatches = 6;

// Output head and embedding have the same numbers; each use is a leaf of its own.
StackModel tied_gpt(bool bf16) {
  StackModel model = test::gpt(bf16);
  at::Tensor head = model.layers.back().parameters[2];
  head.set_data(model.layers[0].parameters[0].detach());
  return model;
}

struct Oracle {
  at::Tensor per_use, per_leaf;
};
Oracle oracle(bool bf16) {
  const Record whole = test::run_uncut([&] { return tied_gpt(bf16); }, kMicroBatches);
  std::vector<at::Tensor> first, second, both;
  for (int64_t i = 0; i < kMicroBatches; ++i) {
    first.push_back(whole.gradients.at({i, 0})[0]);
    second.push_back(whole.gradients.at({i, 6})[2]);
    both.push_back(first.back() + second.back());
  }
  const auto sum = [](const std::vector<at::Tensor>& leaves) { return test::tree_sum(leaves, 0, leaves.size()); };
  return {sum(first) + sum(second), sum(both)};
}

class TiedTest : public testing::TestWithParam<int> {};  // stages
INSTANTIATE_TEST_SUITE_P(Stages, TiedTest, testing::Values(1, 2, 3, 4));

TEST_P(TiedTest, BothCopiesHaveTheOneProcessBits) {
  for (const bool bf16 : {false, true}) {
    const at::Tensor expected = oracle(bf16).per_use;
    run_local_ranks(GetParam(), [&](ProcessGroup& pipeline) {
      const PipelineSchedule schedule = schedule_1f1b(GetParam(), kMicroBatches);
      StackModel model = tied_gpt(bf16);
      const LayerSplit split = test::even_split(model, schedule);
      const LayerRange mine = layers_of_part(split, pipeline.rank());
      std::vector<NamedParameter> named;
      std::vector<at::Tensor> tensors;
      for (int64_t layer = mine.begin; layer < mine.end; ++layer) {
        for (const at::Tensor& parameter : model.layers[layer].parameters) {
          named.push_back({std::to_string(named.size()), parameter});
          tensors.push_back(parameter);
        }
      }
      const auto alone = make_local_world(1);
      GradientReducer reducer(*alone[0], named, {.num_leaves = kMicroBatches});
      reducer.attach_lane(tensors);
      Record unused;
      PipelineCallbacks callbacks = test::stage_callbacks(model, split, schedule, pipeline.rank(), unused);
      callbacks.before_backward = [&](int64_t micro_batch, int) { reducer.begin_leaf(0, micro_batch); };
      callbacks.after_backward = [&](int64_t, int) { reducer.end_leaf(0); };
      reducer.begin_step();
      PipelineRunner(pipeline).run(schedule, callbacks);
      reducer.reduce();
      reducer.wait();

      const int last = GetParam() - 1;
      at::Tensor first, second;
      if (pipeline.rank() == 0) first = reducer.grad(0);
      if (pipeline.rank() == last) second = reducer.grad(named.size() - 1);
      sum_tied_gradients(pipeline, 0, last, first, second);
      if (first.defined()) {
        EXPECT_TRUE(same_bits(first, expected)) << "first use, bf16 " << bf16;
      }
      if (second.defined() && last > 0) {
        EXPECT_TRUE(same_bits(second, expected)) << "second use, bf16 " << bf16;
      }
    });
  }
}

TEST(TiedOracleTest, SummingUsesBeforeMicroBatchesWouldShow) {  // else the test above would prove nothing
  run_local_ranks(1, [](ProcessGroup&) {
    const auto [per_use, per_leaf] = oracle(false);
    EXPECT_FALSE(same_bits(per_use, per_leaf));
  });
}

TEST(TiedSumTest, AnySizeAndAnyTwoStages) {
  for (const int64_t numel : {int64_t{0}, int64_t{1}, int64_t{37}, (int64_t{1} << 22) + 5}) {
    const at::Tensor first = at::arange(numel).to(at::kFloat).mul(0.37f),
                     second = at::arange(numel).to(at::kFloat).mul(-1.1f);
    const at::Tensor expected = first + second;
    for (const auto& [a, b] : {std::pair{0, 3}, std::pair{2, 1}}) {
      run_local_ranks(4, [&, a = a, b = b](ProcessGroup& pipeline) {
        const at::Tensor mine = pipeline.rank() == a   ? first.clone()
                                : pipeline.rank() == b ? second.clone()
                                                       : at::Tensor();
        sum_tied_gradients(pipeline, a, b, pipeline.rank() == a ? mine : at::Tensor(),
                           pipeline.rank() == b ? mine : at::Tensor());
        if (mine.defined()) {
          EXPECT_TRUE(same_bits(mine, expected)) << numel;
        }
      });
    }
  }
}

TEST(TiedSumTest, AMissingGradientIsAnError) {
  const auto world = make_local_world(1);
  EXPECT_THROW(sum_tied_gradients(*world[0], 0, 0, at::zeros({3}), {}), CheckFailed);
  EXPECT_THROW(sum_tied_gradients(*world[0], 0, 0, at::zeros({3}), at::zeros({4})), CheckFailed);
  EXPECT_THROW(sum_tied_gradients(*world[0], 0, 0, at::zeros({3}), at::zeros({3}, at::kBFloat16)), CheckFailed);
}

}  // namespace
}  // namespace lockstep
