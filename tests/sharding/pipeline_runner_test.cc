// The oracle: the same layers in one graph, micro-batch by micro-batch.
#include <mutex>

#include <gmock/gmock.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/mesh.h>
#include <lockstep/sharding/gradient_reducer.h>

#include "forwarding_group.h"
#include "pipeline_model.h"

namespace lockstep {
namespace {

using test::Record;
using test::StackModel;
using testing::HasSubstr;
using Kind = ActionKind;
using Moment = PipelineCallbacks::Moment;

std::string name_of(const PipelineSchedule& schedule) {
  return schedule.name + " of " + std::to_string(schedule.num_stages) + " stages, " +
         std::to_string(schedule.num_chunks) + " chunks, " + std::to_string(schedule.num_micro_batches) +
         " micro-batches";
}

std::vector<PipelineSchedule> schedules(int num_stages, const std::vector<int64_t>& micro_batches) {
  std::vector<PipelineSchedule> all;
  for (const int64_t m : micro_batches) {
    all.push_back(gpipe_schedule(num_stages, m));
    for (const int chunks : {1, 2, 3}) all.push_back(interleaved_schedule(num_stages, chunks, m));
  }
  return all;
}

// Every rank's record of every schedule against the uncut model; and together the ranks must have all of it.
void expect_uncut_bits(int num_stages, const std::function<StackModel()>& make,
                       const std::vector<int64_t>& micro_batches) {
  const Record whole = test::run_uncut(make, *std::max_element(micro_batches.begin(), micro_batches.end()));
  const int64_t num_layers = static_cast<int64_t>(make().layers.size());
  for (const PipelineSchedule& schedule : schedules(num_stages, micro_batches)) {
    validate(schedule);
    std::mutex mutex;
    std::map<test::Place, int> seen;
    int64_t num_losses = 0;
    run_local_ranks(num_stages, [&](ProcessGroup& pipeline) {
      const Record part = test::run_cut(pipeline, make, schedule);
      expect_same(part, whole, name_of(schedule));
      const std::lock_guard lock(mutex);
      for (const auto& [place, strides] : part.output_strides)
        seen[place] += part.gradients.contains(place) || make().layers[place.layer].parameters.empty();
      num_losses += static_cast<int64_t>(part.losses.size());
    });
    EXPECT_EQ(seen.size(), static_cast<size_t>(num_layers * schedule.num_micro_batches)) << name_of(schedule);
    for (const auto& [place, times] : seen) EXPECT_EQ(times, 1) << name_of(schedule);
    EXPECT_EQ(num_losses, schedule.num_micro_batches) << name_of(schedule);
  }
}

class PipelineRunnerTest : public testing::TestWithParam<int> {};  // stages
INSTANTIATE_TEST_SUITE_P(Stages, PipelineRunnerTest, testing::Values(1, 2, 3, 4));

TEST_P(PipelineRunnerTest, GradientsOfEachMicroBatchAreTheUncutModels) {
  expect_uncut_bits(GetParam(), [] { return test::gpt(/*bf16=*/false); }, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
}

TEST_P(PipelineRunnerTest, AlsoInBf16) {
  expect_uncut_bits(GetParam(), [] { return test::gpt(/*bf16=*/true); }, {1, 4, 7});
}

TEST_P(PipelineRunnerTest, AlsoWhereBoundariesAreChannelsLast) {
  expect_uncut_bits(GetParam(), test::convolutions, {1, 3});
}

TEST_P(PipelineRunnerTest, AlsoWithStridesOfEveryKind) { expect_uncut_bits(GetParam(), test::odd_layouts, {1, 2}); }

TEST(PipelineRunnerOracleTest, TheseBoundariesHaveOddStrides) {  // else the tests above would prove nothing
  const Record images = test::run_uncut(test::convolutions, 1), odd = test::run_uncut(test::odd_layouts, 1);
  EXPECT_EQ(images.output_strides.at({0, 1}), (std::vector<int64_t>{576, 1, 96, 16}));
  EXPECT_EQ(odd.output_strides.at({0, 2}), (std::vector<int64_t>{1, 5, 20}));
  EXPECT_EQ(odd.output_strides.at({0, 5})[0], 0);
  EXPECT_EQ(odd.gradient_strides.at({0, 7}), (std::vector<int64_t>{0, 0, 0}));
}

TEST_P(PipelineRunnerTest, EvaluationGivesTheLastStageEveryOutputWhateverItsShape) {
  constexpr int64_t kMicroBatches = 5;
  const at::Tensor first = test::random_tensor({6, 3}, 1), second = test::random_tensor({2, 6}, 2);
  const auto batch = [](int64_t i) { return test::random_tensor({i == kMicroBatches - 1 ? 1 : 4, 3}, 50 + i); };
  for (const int chunks : {1, 2}) {
    run_local_ranks(GetParam(), [&](ProcessGroup& pipeline) {
      const PipelineSchedule schedule = forward_only_schedule(GetParam(), chunks, kMicroBatches);
      PipelineRunner runner(pipeline);
      const int last = schedule.num_positions() - 1;
      const auto outputs = runner.run(schedule, {.forward = [&](int64_t micro_batch, int chunk, at::Tensor x) {
                                        const int position = chunk * GetParam() + pipeline.rank();
                                        EXPECT_FALSE(at::GradMode::is_enabled());
                                        if (position == 0)
                                          x = at::linear(batch(micro_batch), first.clone().requires_grad_());
                                        return position == last ? at::linear(x, second.clone().requires_grad_()) : x;
                                      }});
      ASSERT_EQ(outputs.size(), pipeline.rank() == GetParam() - 1 ? kMicroBatches : 0);
      for (size_t i = 0; i < outputs.size(); ++i) {
        EXPECT_TRUE(same_bits(outputs[i], at::linear(at::linear(batch(static_cast<int64_t>(i)), first), second)));
      }
    });
  }
}

// Counts what is sent.
class SendCountingGroup : public test::ForwardingGroup {
 public:
  explicit SendCountingGroup(ProcessGroup& inner) : ForwardingGroup(inner) {}
  Work send(at::Tensor tensor, int to, int tag, Milliseconds timeout) override {
    sent_bytes += static_cast<int64_t>(tensor.nbytes());
    ++num_sent;
    return ForwardingGroup::send(std::move(tensor), to, tag, timeout);
  }
  int64_t sent_bytes = 0, num_sent = 0;
};

TEST(PipelineRunnerFrozenTest, NoGradientGoesBackToWhereNothingIsTrainable) {
  for (const int chunks : {1, 2}) {
    const PipelineSchedule schedule = interleaved_schedule(3, chunks, 4);
    const auto make = [] {
      StackModel model = test::gpt(false);
      for (int layer = 0; layer < 3; ++layer) {  // of 2, 2, 3 on three stages
        for (auto& parameter : model.layers[layer].parameters) parameter.requires_grad_(false);
      }
      return model;
    };
    const Record whole = test::run_uncut(make, 4);
    run_local_ranks(3, [&](ProcessGroup& inner) {
      SendCountingGroup pipeline(inner);
      expect_same(test::run_cut(pipeline, make, schedule), whole, name_of(schedule));
      // A header and a body a micro-batch: two activations go on, one gradient comes back.
      if (chunks == 1) {
        EXPECT_EQ(pipeline.num_sent, 2 * 4) << inner.rank();
      }
    });
  }
}

TEST(PipelineRunnerFrozenTest, AStageThatDoesNotUseItsInputGivesNoGradientBack) {
  const auto make = [] {
    StackModel model = test::odd_layouts();
    auto& layer = model.layers[3];
    layer.forward = [p = layer.parameters](const at::Tensor& x, int64_t) { return x.detach() * p[0]; };
    return model;
  };
  const Record whole = test::run_uncut(make, 3);
  run_local_ranks(3, [&](ProcessGroup& pipeline) {
    int calls = 0;
    const LayerSplit split{3, 3, 3};
    const PipelineSchedule schedule = schedule_1f1b(3, 3);
    StackModel model = make();
    Record record;
    PipelineCallbacks callbacks = test::stage_callbacks(model, split, schedule, pipeline.rank(), record);
    callbacks.before_backward = [&](int64_t, int) { ++calls; };
    PipelineRunner(pipeline).run(schedule, callbacks);
    expect_same(record, whole, "detached");
    EXPECT_EQ(calls, 3) << "a reducer waits for every micro-batch";
  });
}

TEST(PipelineRunnerMemoryTest, WhatIsSentOrDoneIsNotHeld) {
  const PipelineSchedule schedule = schedule_1f1b(3, 6);
  run_local_ranks(3, [&](ProcessGroup& pipeline) {
    struct Held {
      c10::weak_intrusive_ptr<c10::StorageImpl> input, output;
    };
    std::map<int64_t, Held> held;
    const at::Tensor weight = at::ones({64}).requires_grad_();
    const auto weak = [](const at::Tensor& tensor) {
      return c10::weak_intrusive_ptr<c10::StorageImpl>(tensor.storage().getWeakStorageImpl());
    };
    PipelineCallbacks callbacks;
    callbacks.forward = [&](int64_t micro_batch, int, at::Tensor x) {
      if (!x.defined()) x = test::random_tensor({64}, micro_batch);
      const at::Tensor y = x * weight;  // saves x, not y
      held.emplace(micro_batch, Held{weak(x), weak(y)});
      return pipeline.rank() == 2 ? y.sum() : y;
    };
    callbacks.observe = [&](const PipelineAction& action, Moment moment) {
      if (moment == Moment::kBegin || !held.contains(action.micro_batch)) return;
      const Held& tensors = held.at(action.micro_batch);
      if (action.kind == Kind::kSendForward) {
        EXPECT_TRUE(tensors.output.expired()) << action.describe();
      }
      EXPECT_EQ(tensors.input.expired(), action.kind == Kind::kBackward || action.kind == Kind::kSendBackward)
          << action.describe();
    };
    PipelineRunner(pipeline).run(schedule, callbacks);
    EXPECT_EQ(held.size(), 6);
  });
}

TEST(PipelineRunnerObserverTest, SeesEveryActionBeginAndEndInOrder) {
  const PipelineSchedule schedule = interleaved_schedule(2, 2, 3);
  run_local_ranks(2, [&](ProcessGroup& pipeline) {
    StackModel model = test::gpt(false);
    const LayerSplit split = test::even_split(model, schedule);
    Record record;
    PipelineCallbacks callbacks = test::stage_callbacks(model, split, schedule, pipeline.rank(), record);
    std::vector<PipelineAction> began, ended;
    callbacks.observe = [&](const PipelineAction& action, Moment moment) {
      (moment == Moment::kBegin ? began : ended).push_back(action);
      EXPECT_EQ(began.size(), ended.size() + (moment == Moment::kBegin));
    };
    PipelineRunner(pipeline).run(schedule, callbacks);
    EXPECT_EQ(began, schedule.stages[pipeline.rank()]);
    EXPECT_EQ(ended, schedule.stages[pipeline.rank()]);
  });
}

TEST(PipelineRunnerErrorTest, SaysWhatIsWrong) {
  const auto expect_failure = [](int num_stages, const PipelineSchedule& schedule, const PipelineCallbacks& callbacks,
                                 const std::string& text) {
    try {
      run_local_ranks(num_stages, [&](ProcessGroup& pipeline) { PipelineRunner(pipeline).run(schedule, callbacks); });
      ADD_FAILURE() << "no error: " << text;
    } catch (const CheckFailed& error) {
      EXPECT_THAT(error.what(), HasSubstr(text));
    }
  };
  const auto constant = [](int64_t, int, const at::Tensor&) { return at::zeros({}); };
  expect_failure(1, schedule_1f1b(2, 2), {.forward = constant}, "2 stages cannot run on the 1 ranks");
  expect_failure(1, schedule_1f1b(1, 2), {.forward = constant}, "micro-batch 0 requires no gradient");
  expect_failure(1, schedule_1f1b(1, 2), {.forward = [](int64_t, int, const at::Tensor& x) { return x; }},
                 "returned no tensor");
}

TEST(PipelineRunnerErrorTest, StagesWithDifferentSchedulesAreToldApart) {
  std::atomic<int> told{0};
  EXPECT_THROW(run_local_ranks(2,
                               [&](ProcessGroup& pipeline) {
                                 PipelineSchedule schedule = gpipe_schedule(2, 2);
                                 if (pipeline.rank() == 0) {
                                   for (PipelineAction& action : schedule.stages[0]) action.micro_batch ^= 1;
                                 }
                                 StackModel model = test::gpt(false);
                                 const LayerSplit split{3, 4};
                                 Record record;
                                 try {
                                   PipelineRunner(pipeline).run(
                                       schedule,
                                       test::stage_callbacks(model, split, schedule, pipeline.rank(), record));
                                 } catch (const CheckFailed& error) {
                                   EXPECT_THAT(error.what(), HasSubstr("the stages run different schedules"));
                                   ++told;
                                   throw;
                                 }
                               }),
               Error);
  EXPECT_EQ(told, 1);
}

// Reducers of one pipeline stage: one for each chunk, on a group of its own, because columns with more or fewer
// micro-batches come to their chunks' buckets in another order.
struct ChunkReducers {
  std::vector<std::unique_ptr<ProcessGroup>> groups;
  std::vector<std::unique_ptr<GradientReducer>> of_chunk;

  ChunkReducers(ProcessGroup& data, StackModel& model, const LayerSplit& split, int stage, int num_stages,
                int64_t num_leaves) {
    for (size_t position = static_cast<size_t>(stage); position < split.size(); position += num_stages) {
      std::vector<NamedParameter> named;
      std::vector<at::Tensor> tensors;
      const LayerRange range = layers_of_part(split, static_cast<int>(position));
      for (int64_t layer = range.begin; layer < range.end; ++layer) {
        for (const at::Tensor& parameter : model.layers[layer].parameters) {
          named.push_back({std::to_string(layer) + "." + std::to_string(named.size()), parameter});
          tensors.push_back(parameter);
        }
      }
      groups.push_back(data.split(0, data.rank(), "data of chunk"));
      of_chunk.push_back(std::make_unique<GradientReducer>(
          *groups.back(), named,
          GradientReducerOptions{.num_leaves = num_leaves, .bucket_bytes = 1024, .first_bucket_bytes = 256}));
      of_chunk.back()->attach_lane(tensors);
    }
  }
  void reduce() {
    for (auto& reducer : of_chunk) reducer->reduce();
    for (auto& reducer : of_chunk) reducer->wait();
  }
};

// Two columns of a pipeline share the micro-batches of a step, unevenly; sums are the ones of a single rank.
TEST(PipelineRunnerDataParallelTest, SumsOverColumnsAreTheUncutModels) {
  for (const auto& [p, v, num_leaves] :
       std::vector<std::tuple<int, int, int64_t>>{{1, 1, 5}, {2, 1, 5}, {2, 2, 5}, {2, 3, 7}, {2, 2, 1}}) {
    const auto make = [] { return test::gpt(false); };
    const Record whole = test::run_uncut(make, num_leaves);
    run_local_ranks(2 * p, [&, p = p, v = v, num_leaves = num_leaves](ProcessGroup& world) {
      const Mesh mesh(world, {.pipeline = p, .data = 2});
      StackModel model = make();
      const LeafShare share = leaf_share(num_leaves, mesh.data().rank(), 2);
      const PipelineSchedule schedule = interleaved_schedule(p, v, share.count());
      const LayerSplit split = test::even_split(model, schedule);
      const int stage = mesh.pipeline().rank();
      ChunkReducers reducers(mesh.data(), model, split, stage, p, num_leaves);
      Record unused;
      PipelineCallbacks callbacks = test::stage_callbacks(model, split, schedule, stage, unused);
      callbacks.forward = [&, inner = callbacks.forward](int64_t micro_batch, int chunk, at::Tensor input) {
        return run_layers(model, layers_of_part(split, chunk * p + stage),
                          chunk == 0 && stage == 0 ? model.batch(share.begin + micro_batch) : std::move(input),
                          share.begin + micro_batch, unused);
      };
      callbacks.before_backward = [&](int64_t micro_batch, int chunk) {
        reducers.of_chunk[chunk]->begin_leaf(0, share.begin + micro_batch);
      };
      callbacks.after_backward = [&](int64_t, int chunk) { reducers.of_chunk[chunk]->end_leaf(0); };
      PipelineRunner runner(mesh.pipeline());
      for (int repeat = 0; repeat < 2; ++repeat) {
        for (auto& reducer : reducers.of_chunk) reducer->begin_step();
        runner.run(schedule, callbacks);
        reducers.reduce();
        for (int chunk = 0; chunk < v; ++chunk) {
          size_t i = 0;
          const LayerRange range = layers_of_part(split, chunk * p + stage);
          for (int64_t layer = range.begin; layer < range.end; ++layer) {
            for (size_t k = 0; k < model.layers[layer].parameters.size(); ++k, ++i) {
              std::vector<at::Tensor> leaves;
              for (int64_t leaf = 0; leaf < num_leaves; ++leaf) leaves.push_back(whole.gradients.at({leaf, layer})[k]);
              EXPECT_TRUE(same_bits(reducers.of_chunk[chunk]->grad(i), test::tree_sum(leaves, 0, leaves.size())))
                  << name_of(schedule) << ", stage " << stage << ", layer " << layer << ", parameter " << k;
            }
          }
        }
      }
      mesh.world().barrier();
    });
  }
}

}  // namespace
}  // namespace lockstep
