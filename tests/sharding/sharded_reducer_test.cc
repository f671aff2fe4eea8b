// Stages 1 to 3 of ZeRO give each rank its rows of the very sum that the whole gradient would be.
#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/sharding/bucket_layout.h>
#include <lockstep/sharding/gradient_reducer.h>
#include <lockstep/sharding/sharded_reducer.h>

#include "known_gradients.h"

namespace lockstep {
namespace {

using test::kShapes;
using test::leaf_gradient;
using test::Model;
using test::tree_sum;

const std::vector<std::vector<size_t>> kUnits = {{0, 1, 2}, {3}, {4, 5, 6}};

struct Layout {
  int world_size, num_shards;
};
const std::vector<Layout> kLayouts = {{1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}, {8, 8}, {4, 2}, {6, 3}, {8, 2}, {3, 1}};

void run_step(GradientSync& sync, const Model& model, const std::vector<int64_t>& leaves) {
  sync.begin_step();
  for (const int64_t leaf : leaves) {
    sync.begin_leaf(0, leaf);
    model.backward(leaf);
    sync.end_leaf(0);
  }
}

ExactSum run_step(ShardedReducer& sync, const Model& model) {
  run_step(sync, model, sync.leaves());
  for (auto round = static_cast<int64_t>(sync.leaves().size()); round < sync.num_rounds(); ++round) sync.absent_leaf();
  return sync.reduce();
}

void expect_rows(const GradientSync& sync, const Layout& layout, int rank, int64_t leaves, const char* what) {
  for (size_t i = 0; i < kShapes.size(); ++i) {
    const at::Tensor rows = shard_of(tree_sum(0, leaves, i), rank % layout.num_shards, layout.num_shards);
    EXPECT_TRUE(same_bits(sync.grad(i), rows.contiguous()))
        << what << ": parameter " << i << ", " << leaves << " leaves, rank " << rank << " of " << layout.world_size
        << ", " << layout.num_shards << " shards";
  }
}

TEST(ShardedGradientsTest, EachRankHasItsRowsOfTheCanonicalTree) {
  for (const Layout& layout : kLayouts) {
    for (const int64_t leaves : {8, 13, 16}) {
      run_local_ranks(layout.world_size, [&](ProcessGroup& group) {
        const Model model, other;
        GradientReducer accumulating(group, model.named(),
                                     {.num_leaves = leaves, .num_shards = layout.num_shards, .bucket_bytes = 2048});
        accumulating.attach_lane(model.tensors);
        ShardedReducer streaming(group, other.named(),
                                 {.num_leaves = leaves, .num_shards = layout.num_shards, .units = kUnits});
        streaming.attach_lane(other.tensors);
        for (int repeat = 0; repeat < 2; ++repeat) {
          run_step(accumulating, model, accumulating.leaves());
          accumulating.reduce();
          accumulating.wait();
          expect_rows(accumulating, layout, group.rank(), leaves, "accumulating");
          run_step(streaming, other);
          streaming.wait();
          expect_rows(streaming, layout, group.rank(), leaves, "streaming");
        }
      });
    }
  }
}

TEST(ShardedGradientsTest, SquaresMergedOverRanksCountEachElementOnce) {
  constexpr int64_t kLeaves = 11;
  ExactSum expected;
  for (size_t i = 0; i < kShapes.size(); ++i) {
    const at::Tensor sum = tree_sum(0, kLeaves, i);
    expected.add_squares({sum.const_data_ptr<float>(), static_cast<size_t>(sum.numel())});
  }
  for (const Layout& layout : kLayouts) {
    ExactSum merged, merged_too;
    std::mutex mutex;
    run_local_ranks(layout.world_size, [&](ProcessGroup& group) {
      const Model model, other;
      GradientReducer accumulating(group, model.named(), {.num_leaves = kLeaves, .num_shards = layout.num_shards});
      accumulating.attach_lane(model.tensors);
      run_step(accumulating, model, accumulating.leaves());
      const ExactSum squares = accumulating.reduce();
      accumulating.wait();
      ShardedReducer streaming(group, other.named(),
                               {.num_leaves = kLeaves, .num_shards = layout.num_shards, .units = kUnits});
      streaming.attach_lane(other.tensors);
      const ExactSum squares_too = run_step(streaming, other);
      streaming.wait();
      const std::lock_guard lock(mutex);
      merged.merge(squares);
      merged_too.merge(squares_too);
    });
    EXPECT_EQ(merged.value(), expected.value()) << layout.world_size;
    EXPECT_EQ(merged_too.value(), expected.value()) << layout.world_size;
  }
}

// Embedding and head are one weight, used twice: a tree for each use, then first + second. Where a rank sends one root
// of each (8 leaves), the first use's gradients are summed where the second one's were, if those came first.
TEST(ShardedGradientsTest, ATiedWeightGetsTheSumOfItsUsesTrees) {
  const std::function<at::Tensor(int64_t, int64_t)> second_tree = [&](int64_t begin, int64_t end) -> at::Tensor {
    if (end - begin == 1) return leaf_gradient(begin + 100, 1);
    int64_t half = 1;
    while (2 * half < end - begin) half *= 2;
    return second_tree(begin, begin + half) + second_tree(begin + half, end);
  };
  for (const int64_t num_leaves : {8, 13}) {
    const at::Tensor sum = tree_sum(0, num_leaves, 1) + second_tree(0, num_leaves);
    for (const Layout& layout : kLayouts) {
      run_local_ranks(layout.world_size, [&](ProcessGroup& group) {
        for (const bool streams : {false, true}) {
          const at::Tensor weight = torch::zeros({17, 5}, torch::requires_grad()),
                           other = torch::zeros({31, 33}, torch::requires_grad());
          const at::Tensor alias = weight.detach().requires_grad_();
          const std::vector<NamedParameter> named = {
              {"embedding", weight}, {"block", other}, {"head", alias, /*first_use=*/0}};
          std::unique_ptr<GradientSync> sync;
          ShardedReducer* rounds = nullptr;
          if (streams) {
            auto reducer = std::make_unique<ShardedReducer>(
                group, named,
                ShardedReducerOptions{
                    .num_leaves = num_leaves, .num_shards = layout.num_shards, .units = {{0, 1}, {2}}});
            rounds = reducer.get();
            sync = std::move(reducer);
          } else {
            sync = std::make_unique<GradientReducer>(
                group, named, GradientReducerOptions{.num_leaves = num_leaves, .num_shards = layout.num_shards});
          }
          sync->attach_lane({weight, other, alias});
          for (int step = 0; step < 4; ++step) {
            const bool first_use_comes_first = (step + group.rank()) % 3 == 1;
            sync->begin_step();
            const auto leaves = sync->leaves();
            for (const int64_t leaf : leaves) {
              sync->begin_leaf(0, leaf);
              const auto first = [&] { return (weight * leaf_gradient(leaf, 1)).sum(); };
              const auto second = [&] { return (alias * leaf_gradient(leaf + 100, 1)).sum(); };
              const at::Tensor made_first = first_use_comes_first ? second() : first();
              const at::Tensor between = made_first + (other * leaf_gradient(leaf, 4)).sum();
              (between + (first_use_comes_first ? first() : second())).backward();
              sync->end_leaf(0);
            }
            for (auto k = static_cast<int64_t>(leaves.size()); rounds && k < rounds->num_rounds(); ++k)
              rounds->absent_leaf();
            sync->reduce();
            sync->wait();
            const int shard = group.rank() % layout.num_shards;
            EXPECT_TRUE(same_bits(sync->grad(0), shard_of(sum, shard, layout.num_shards).contiguous()))
                << (streams ? "streaming" : "accumulating") << " on " << layout.world_size << ", step " << step << ", "
                << num_leaves << " leaves";
            EXPECT_FALSE(sync->grad(2).defined());
          }
        }
      });
    }
  }
}

TEST(ShardedReducerTest, SaysWhenAUnitIsDoneAndMissesLeaves) {
  run_local_ranks(2, [&](ProcessGroup& group) {
    const Model model;
    std::vector<size_t> done;
    ShardedReducer sync(group, model.named(),
                        {.num_leaves = 4, .num_shards = 2, .units = kUnits, .on_unit_done = [&](size_t unit) {
                           done.push_back(unit);
                         }});
    sync.attach_lane(model.tensors);
    run_step(sync, model, {group.rank()});
    EXPECT_THAT(done, testing::UnorderedElementsAre(0, 1, 2)) << "once a micro-batch";
    EXPECT_THROW(sync.fold(), CheckFailed) << "one of two rounds is missing";
    run_step(sync, model);
    sync.wait();
    expect_rows(sync, {2, 2}, group.rank(), 4, "after a step that was given up");
    EXPECT_THROW(ShardedReducer(group, model.named(), {.num_leaves = 1, .num_shards = 2, .units = kUnits}),
                 CheckFailed);
  });
}

}  // namespace
}  // namespace lockstep
