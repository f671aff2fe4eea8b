#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/collectives/mesh.h>

#include "numbers.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string refusal(const MeshShape& wanted, int world_size) {
  try {
    resolve_mesh(wanted, world_size);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no ConfigError";
}

TEST(ResolveMeshTest, DataParallelIsWhatTheOthersLeave) {
  EXPECT_EQ(resolve_mesh({}, 7).data, 7);
  EXPECT_EQ(resolve_mesh({.pipeline = 2, .context = 3, .tensor = 2}, 24).data, 2);
  EXPECT_EQ(resolve_mesh({.data = 4, .tensor = 2}, 8).data, 4);
}

TEST(ResolveMeshTest, SizesThatDisagreePrintBothSidesAndTheMend) {
  EXPECT_THAT(refusal({.data = 3, .tensor = 2}, 8),
              AllOf(HasSubstr("dp 3 x cp 1 x tp 2 x pp 1 = 6"), HasSubstr("world_size is 8"),
                    HasSubstr("set --data_parallel_size=4")));
  EXPECT_THAT(refusal({.pipeline = 3}, 8),
              AllOf(HasSubstr("pp 3 = 6"), HasSubstr("world_size is 8"), HasSubstr("start a multiple of 3 ranks")));
  EXPECT_THAT(refusal({.tensor = 4}, 2),
              AllOf(HasSubstr("tp 4"), HasSubstr("world_size is 2"), HasSubstr("start a multiple of 4 ranks")));
  EXPECT_THAT(refusal({.pipeline = 3, .data = 5}, 8), HasSubstr("start a multiple of 3 ranks"));
  EXPECT_THAT(refusal({.tensor = 0}, 8), HasSubstr("is 0; it must be at least 1"));
  EXPECT_THAT(refusal({.data = -2}, 8), HasSubstr("set --data_parallel_size=8"));
  EXPECT_THAT(refusal({.expert = 4}, 6), AllOf(HasSubstr("expert-parallel size 4 does not divide data-parallel size 6"),
                                               HasSubstr("set --expert_parallel_size=2")));
}

std::vector<int64_t> members(ProcessGroup& axis, int world_rank) {
  at::Tensor all = at::empty({axis.size()}, at::kLong);
  axis.all_gather(all, at::full({1}, world_rank, at::kLong)).wait();
  const auto* data = all.const_data_ptr<int64_t>();
  return {data, data + all.numel()};
}

TEST(MeshTest, ExpertsAreSharedByNeighboursOnTheDataAxis) {
  run_local_ranks(8, [](ProcessGroup& world) {
    using Ranks = std::vector<int64_t>;
    Mesh mesh(world, {.tensor = 2, .expert = 2});
    const int64_t me = world.rank(), group = me / 4 * 4 + me % 2, same = me % 4;
    EXPECT_EQ(members(*mesh.experts(), world.rank()), (Ranks{group, group + 2}));
    EXPECT_EQ(members(*mesh.expert_replicas(), world.rank()), (Ranks{same, same + 4}));
    EXPECT_EQ(Mesh(world, {}).experts(), nullptr);
  });
}

TEST(MeshTest, PipelineIsOutermostAndTensorRanksAreNeighbours) {
  run_local_ranks(8, [](ProcessGroup& world) {
    Mesh mesh(world, {.pipeline = 2, .tensor = 2});
    const int64_t me = world.rank();
    using Ranks = std::vector<int64_t>;
    EXPECT_EQ(members(mesh.tensor(), world.rank()), (Ranks{me / 2 * 2, me / 2 * 2 + 1}));
    EXPECT_EQ(members(mesh.data(), world.rank()), (Ranks{me / 4 * 4 + me % 2, me / 4 * 4 + me % 2 + 2}));
    EXPECT_EQ(members(mesh.context(), world.rank()), (Ranks{me}));
    EXPECT_EQ(members(mesh.pipeline(), world.rank()), (Ranks{me % 4, me % 4 + 4}));
    EXPECT_EQ(mesh.describe(), "pp 2 x dp 2 x cp 1 x tp 2 over 8 ranks (local)");
    EXPECT_EQ(mesh.data().name(), "data");
    EXPECT_EQ(&mesh.world(), &world);
    mesh.close();
  });
}

TEST(MeshTest, EveryAxisHoldsTheRanksThatDifferInItAlone) {
  struct Case {
    MeshShape shape;
    int world_size;
  };
  for (const Case& layout :
       {Case{{}, 1}, Case{{}, 7}, Case{{.tensor = 3}, 6}, Case{{.pipeline = 3, .context = 2}, 6},
        Case{{.pipeline = 2, .context = 2, .tensor = 2}, 8}, Case{{.pipeline = 2, .context = 3, .tensor = 2}, 24}}) {
    run_local_ranks(layout.world_size, [&](ProcessGroup& world) {
      Mesh mesh(world, layout.shape);
      const MeshShape shape = mesh.shape();
      ProcessGroup* const axes[] = {&mesh.pipeline(), &mesh.data(), &mesh.context(), &mesh.tensor()};
      const int sizes[] = {shape.pipeline, shape.data, shape.context, shape.tensor};
      int64_t composed = 0;  // the rank told by the places on the axes, outermost first
      for (int axis = 0; axis < 4; ++axis) {
        EXPECT_EQ(axes[axis]->size(), sizes[axis]) << mesh.describe();
        composed = composed * sizes[axis] + axes[axis]->rank();
      }
      EXPECT_EQ(composed, world.rank()) << mesh.describe();
      int64_t stride = 1;
      for (int axis = 3; axis >= 0; --axis) {
        const auto ranks = members(*axes[axis], world.rank());
        for (size_t i = 0; i < ranks.size(); ++i) {
          EXPECT_EQ(ranks[i], world.rank() + (static_cast<int64_t>(i) - axes[axis]->rank()) * stride)
              << mesh.describe() << ", axis " << axes[axis]->name();
        }
        stride *= sizes[axis];
      }
      mesh.close();
    });
  }
}

TEST(MeshTest, AWorldThatDoesNotFitIsRefusedOnEveryRank) {
  run_local_ranks(3, [](ProcessGroup& world) { EXPECT_THROW(Mesh(world, {.tensor = 2}), ConfigError); });
}

}  // namespace
}  // namespace lockstep
