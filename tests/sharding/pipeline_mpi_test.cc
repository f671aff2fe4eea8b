// One case from end to end on processes, where sends are not copies and large ones wait for their receive.
#include <lockstep/base/error.h>
#include <lockstep/collectives/mpi_group.h>
#include <lockstep/sharding/tied.h>

#include "pipeline_model.h"

namespace lockstep {
namespace {

TEST(PipelineMpiTest, GradientsOfEachMicroBatchAreTheUncutModels) {
  const auto world = make_mpi_world();
  for (const bool bf16 : {false, true}) {
    const auto make = [bf16] { return test::gpt(bf16); };
    const test::Record whole = test::run_uncut(make, 5);
    for (const PipelineSchedule& schedule : {gpipe_schedule(world->size(), 5), schedule_1f1b(world->size(), 5),
                                             interleaved_schedule(world->size(), 2, 5)}) {
      run_local_ranks(1, [&](ProcessGroup&) {  // a thread whose arithmetic is set up as in run_uncut
        expect_same(test::run_cut(*world, make, schedule), whole, schedule.name);
      });
    }
  }
  world->close();
}

TEST(PipelineMpiTest, LargeTensorsOfChangingShapesGoBothWays) {
  const auto world = make_mpi_world();
  const int last = world->size() - 1;
  const PipelineSchedule schedule = interleaved_schedule(world->size(), 2, 6);
  const at::Tensor weight = at::ones({}).requires_grad_();
  PipelineCallbacks callbacks;
  callbacks.forward = [&](int64_t micro_batch, int chunk, at::Tensor x) {
    if (!x.defined()) x = at::full({300'000 + 1000 * micro_batch}, 1.0f + static_cast<float>(micro_batch));
    EXPECT_EQ(x.numel(), 300'000 + 1000 * micro_batch);
    const at::Tensor y = x * weight;
    return world->rank() == last && chunk == 1 ? y.slice(0, 0, 2).sum() : y;
  };
  std::vector<float> gradients;
  callbacks.after_backward = [&](int64_t, int chunk) {
    if (chunk == 0) gradients.push_back(weight.grad().item<float>());
    weight.mutable_grad().reset();
  };
  const auto losses = PipelineRunner(*world).run(schedule, callbacks);
  for (size_t i = 0; i < losses.size(); ++i) EXPECT_EQ(losses[i].item<float>(), 2.0f * static_cast<float>(i + 1));
  for (size_t i = 0; i < gradients.size(); ++i) EXPECT_EQ(gradients[i], 2.0f * static_cast<float>(i + 1));
  EXPECT_EQ(gradients.size(), 6);

  const at::Tensor mine = at::full({5'000'000}, static_cast<float>(world->rank() + 1));
  if (world->rank() == 0) sum_tied_gradients(*world, 0, last, mine, last == 0 ? mine.clone() : at::Tensor());
  if (world->rank() == last && last > 0) sum_tied_gradients(*world, 0, last, {}, mine);
  if (world->rank() == 0 || world->rank() == last) {
    EXPECT_TRUE(mine.eq(static_cast<float>(last + 2)).all().item<bool>());
  }
  world->close();
}

}  // namespace
}  // namespace lockstep
