#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/sharding/gradient_reducer.h>

#include "forwarding_group.h"
#include "known_gradients.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;

using test::kShapes;
using test::leaf_gradient;
using test::Model;
using test::tree_sum;

ExactSum step(GradientReducer& reducer, const Model& model) {
  reducer.begin_step();
  for (int64_t leaf = reducer.share().begin; leaf < reducer.share().end; ++leaf) {
    reducer.begin_leaf(0, leaf);
    model.backward(leaf);
    reducer.end_leaf(0);
  }
  return reducer.reduce();
}

class GradientReducerTest : public testing::TestWithParam<int> {};  // world_size
INSTANTIATE_TEST_SUITE_P(WorldSizes, GradientReducerTest, testing::Values(1, 2, 3, 4, 5, 7, 8));

TEST_P(GradientReducerTest, EveryRankHasTheCanonicalTreesBits) {
  for (const int64_t num_leaves : {1, 3, 8, 13}) {
    for (const int64_t bucket_bytes : {int64_t{1}, int64_t{1} << 10, int64_t{1} << 30}) {
      run_local_ranks(GetParam(), [&](ProcessGroup& group) {
        const Model model;
        GradientReducer reducer(group, model.named(), {.num_leaves = num_leaves, .bucket_bytes = bucket_bytes});
        reducer.attach_lane(model.tensors);
        for (int repeat = 0; repeat < 2; ++repeat) {
          step(reducer, model);
          reducer.wait();
          for (size_t i = 0; i < kShapes.size(); ++i) {
            EXPECT_TRUE(same_bits(reducer.grad(i), tree_sum(0, num_leaves, i)))
                << "parameter " << i << ", " << num_leaves << " leaves, buckets of " << bucket_bytes << ", step "
                << repeat << ", rank " << group.rank();
          }
        }
      });
    }
  }
}

TEST(GradientReducerOracleTest, TheOrderOfASumShowsInTheseNumbers) {  // else the test above would prove nothing
  at::Tensor left_to_right = leaf_gradient(0, 4);
  for (int64_t leaf = 1; leaf < 8; ++leaf) left_to_right = left_to_right + leaf_gradient(leaf, 4);
  EXPECT_FALSE(same_bits(left_to_right, tree_sum(0, 8, 4)));
}

TEST_P(GradientReducerTest, FastReductionAddsTheSameNumbers) {
  constexpr int64_t kLeaves = 11;
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const Model model;
    GradientReducer reducer(group, model.named(),
                            {.num_leaves = kLeaves, .bucket_bytes = 2048, .reduction = Reduction::kFast});
    reducer.attach_lane(model.tensors);
    step(reducer, model);
    reducer.wait();
    for (size_t i = 0; i < kShapes.size(); ++i) {
      at::Tensor magnitude = at::zeros(kShapes[i]), sum = at::zeros(kShapes[i], at::kDouble);
      for (int64_t leaf = 0; leaf < kLeaves; ++leaf) {
        magnitude += leaf_gradient(leaf, i).abs();
        sum += leaf_gradient(leaf, i);
      }
      // Any order of n - 1 additions errs by at most (n - 1) eps / 2 of the magnitudes.
      EXPECT_TRUE(((reducer.grad(i) - sum).abs() <= 10 * 6e-8 * magnitude).all().item<bool>());
    }
  });
}

TEST_P(GradientReducerTest, SquaresMergedOverRanksCountEachElementOnce) {
  constexpr int64_t kLeaves = 9;
  ExactSum expected, merged;
  for (size_t i = 0; i < kShapes.size(); ++i) {
    const at::Tensor sum = tree_sum(0, kLeaves, i);
    expected.add_squares({sum.const_data_ptr<float>(), static_cast<size_t>(sum.numel())});
  }
  std::mutex mutex;
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const Model model;
    GradientReducer reducer(group, model.named(), {.num_leaves = kLeaves, .bucket_bytes = 512});
    reducer.attach_lane(model.tensors);
    const ExactSum squares = step(reducer, model);
    reducer.wait();
    const std::lock_guard lock(mutex);
    merged.merge(squares);
  });
  EXPECT_EQ(merged.value(), expected.value());
}

TEST_P(GradientReducerTest, LanesInAnyOrderGiveTheSameBits) {
  constexpr int64_t kLeaves = 13;
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const Model first, second;
    GradientReducer reducer(group, first.named(), {.num_leaves = kLeaves, .bucket_bytes = 512});
    EXPECT_EQ(reducer.attach_lane(first.tensors), 0);
    EXPECT_EQ(reducer.attach_lane(second.tensors), 1);
    reducer.begin_step();
    const LeafShare share = reducer.share();
    std::atomic<int64_t> next{share.end};  // last leaf first
    const auto work = [&](int lane, const Model& model) {
      for (int64_t leaf = --next; leaf >= share.begin; leaf = --next) {
        reducer.begin_leaf(lane, leaf);
        model.backward(leaf);
        reducer.end_leaf(lane);
      }
    };
    std::thread other([&] { work(1, second); });
    work(0, first);
    other.join();
    reducer.reduce();
    reducer.wait();
    for (size_t i = 0; i < kShapes.size(); ++i) EXPECT_TRUE(same_bits(reducer.grad(i), tree_sum(0, kLeaves, i))) << i;
  });
}

TEST_P(GradientReducerTest, AMicroBatchThatLeavesAParameterOutAddsNothingToIt) {
  constexpr int64_t kLeaves = 8, kUsed = 5;
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const Model model;
    GradientReducer reducer(group, model.named(), {.num_leaves = kLeaves});
    reducer.attach_lane(model.tensors);
    reducer.begin_step();
    for (int64_t leaf = reducer.share().begin; leaf < reducer.share().end; ++leaf) {
      reducer.begin_leaf(0, leaf);
      model.backward(leaf, [&](size_t i) { return i != 4 || leaf == kUsed; });
      reducer.end_leaf(0);
    }
    reducer.reduce();
    reducer.wait();
    EXPECT_TRUE(same_bits(reducer.grad(4), leaf_gradient(kUsed, 4)));
    EXPECT_TRUE(same_bits(reducer.grad(1), tree_sum(0, kLeaves, 1)));
  });
}

TEST_P(GradientReducerTest, AParameterNobodyUsesIsNamedOnEveryRank) {
  std::atomic<int> named{0};
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const Model model;
    GradientReducer reducer(group, model.named(), {.num_leaves = 8});
    reducer.attach_lane(model.tensors);
    reducer.begin_step();
    for (int64_t leaf = reducer.share().begin; leaf < reducer.share().end; ++leaf) {
      reducer.begin_leaf(0, leaf);
      model.backward(leaf, [](size_t i) { return i != 1 && i != 5; });
      reducer.end_leaf(0);
    }
    try {
      reducer.reduce();
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("layer1.weight, layer5.weight."), HasSubstr("Mend")));
      ++named;
    }
    reducer.wait();
  });
  EXPECT_EQ(named, GetParam());
}

TEST(GradientReducerBucketTest, AStepThatWasGivenUpLeavesNothingBehind) {
  run_local_ranks(1, [&](ProcessGroup& group) {
    const Model model;
    GradientReducer reducer(group, model.named(), {.num_leaves = 4});
    reducer.attach_lane(model.tensors);
    reducer.begin_step();
    reducer.begin_leaf(0, 2);
    model.backward(1);  // other numbers than the next step's
    reducer.end_leaf(0);
    EXPECT_THROW(reducer.reduce(), CheckFailed);
    step(reducer, model);
    EXPECT_TRUE(same_bits(reducer.grad(1), tree_sum(0, 4, 1)));
  });
}

TEST(GradientReducerBucketTest, GradientsAreViewsThatStayWhereTheyAre) {
  run_local_ranks(2, [](ProcessGroup& group) {
    const Model model;
    GradientReducer reducer(group, model.named(), {.num_leaves = 4, .bucket_bytes = 1 << 20});
    reducer.attach_lane(model.tensors);
    ASSERT_EQ(reducer.num_buckets(), 1);
    std::vector<const void*> places;
    for (size_t i = 0; i < kShapes.size(); ++i) {
      places.push_back(reducer.grad(i).const_data_ptr());
      EXPECT_EQ(reducer.grad(i).storage().data(), reducer.grad(0).storage().data());
      EXPECT_EQ(reinterpret_cast<uintptr_t>(places.back()) % 64, 0) << "no two parameters share a cache line";
    }
    EXPECT_LT(places[5], places[4]);  // reverse order of registration
    step(reducer, model);
    reducer.wait();
    for (size_t i = 0; i < kShapes.size(); ++i) {
      EXPECT_EQ(reducer.grad(i).const_data_ptr(), places[i]);
      EXPECT_FALSE(model.tensors[i].grad().defined()) << "the next backward would add to it";
    }
  });
}

TEST(GradientReducerBucketTest, TheFirstBucketIsSmallAndOthersHoldTheirLimit) {
  run_local_ranks(1, [](ProcessGroup& group) {
    std::vector<NamedParameter> parameters(10);
    for (size_t i = 0; i < 10; ++i) parameters[i] = {std::to_string(i), torch::zeros({256}, torch::requires_grad())};
    const auto buckets = [&](int64_t bytes, int64_t first) {
      return GradientReducer(group, parameters, {.bucket_bytes = bytes, .first_bucket_bytes = first}).num_buckets();
    };
    EXPECT_EQ(buckets(1 << 20, 1 << 20), 1);
    EXPECT_EQ(buckets(4096, 1024), 4);  // 1, then 4, 4, 1 parameters of 1024 bytes
    EXPECT_EQ(buckets(1, 1), 10);       // a parameter larger than the limit has its own
  });
}

// Says when a collective starts.
class WatchedGroup : public test::ForwardingGroup {
 public:
  WatchedGroup(ProcessGroup& inner, std::vector<std::string>& events) : ForwardingGroup(inner), events_(events) {}
  Work all_to_all(at::Tensor output, at::Tensor input, std::span<const int64_t> receive_counts,
                  std::span<const int64_t> send_counts, Milliseconds timeout) override {
    events_.push_back("send " + std::to_string(sent_++));
    return ForwardingGroup::all_to_all(std::move(output), std::move(input), receive_counts, send_counts, timeout);
  }

 private:
  std::vector<std::string>& events_;
  int sent_ = 0;
};

TEST(GradientReducerOverlapTest, BucketsLeaveInsideTheLastBackwardAndInOneOrder) {
  for (const bool reversed : {false, true}) {  // reversed: the model uses its parameters in the opposite order
    run_local_ranks(2, [&](ProcessGroup& inner) {
      std::vector<std::string> events;
      WatchedGroup group(inner, events);
      const at::Tensor first = torch::zeros({64}, torch::requires_grad()),
                       second = torch::zeros({64}, torch::requires_grad());
      GradientReducer reducer(group, {{"first", first}, {"second", second}},
                              {.num_leaves = 4, .bucket_bytes = 1, .first_bucket_bytes = 1});
      reducer.attach_lane({first, second});
      reducer.begin_step();
      const bool mirrored = reversed && inner.rank() == 1;
      for (int64_t leaf = reducer.share().begin; leaf < reducer.share().end; ++leaf) {
        reducer.begin_leaf(0, leaf);
        // Backward reaches what was used last first; the graph marks the moment between the two.
        const at::Tensor &inner_one = mirrored ? second : first, &outer_one = mirrored ? first : second;
        at::Tensor hidden = inner_one * 2;
        hidden.register_hook([&](const at::Tensor&) { events.emplace_back("halfway"); });
        (hidden.sin() * outer_one).sum().backward();
        events.emplace_back("backward done");
        reducer.end_leaf(0);
      }
      reducer.reduce();
      reducer.wait();
      // The first micro-batch only accumulates. Bucket 0 holds "second", bucket 1 holds "first", on every rank.
      const std::vector<std::string> expected =
          mirrored
              ? std::vector<std::string>{"halfway", "backward done", "halfway", "send 0", "send 1", "backward done"}
              : std::vector<std::string>{"halfway", "backward done", "send 0", "halfway", "send 1", "backward done"};
      events.resize(expected.size());
      EXPECT_EQ(events, expected) << "rank " << inner.rank();
    });
  }
}

TEST(GradientReducerMistakeTest, DifferentModelsAreRefusedOnBothRanks) {
  std::atomic<int> refused{0};
  run_local_ranks(2, [&](ProcessGroup& group) {
    const at::Tensor weight = torch::zeros({3 + group.rank()}, torch::requires_grad());
    try {
      const GradientReducer reducer(group, {{"weight", weight}}, {});
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 0"), HasSubstr("rank 1"), HasSubstr("built different models")));
      ++refused;
    }
    group.barrier();
  });
  EXPECT_EQ(refused, 2);
}

TEST(GradientReducerMistakeTest, MisuseSaysWhichParameter) {
  run_local_ranks(1, [](ProcessGroup& group) {
    const at::Tensor weight = torch::zeros({3}, torch::requires_grad());
    EXPECT_THROW(GradientReducer(group, {{"weight", torch::zeros({3}, at::kDouble)}}, {}), CheckFailed);
    EXPECT_THROW(GradientReducer(group, {{"weight", torch::zeros({3, 4}).t()}}, {}), CheckFailed);

    GradientReducer reducer(group, {{"weight", weight}}, {.num_leaves = 2});
    EXPECT_THROW(reducer.attach_lane({weight, weight}), CheckFailed);
    reducer.attach_lane({weight});
    reducer.begin_step();
    EXPECT_THROW(reducer.begin_leaf(0, 2), CheckFailed);
    const auto expect_refusal = [&](const char* text) {
      try {
        weight.sum().backward();
        ADD_FAILURE() << "not refused: " << text;
      } catch (const CheckFailed& error) {
        EXPECT_THAT(error.what(), AllOf(HasSubstr("weight"), HasSubstr(text)));
      }
    };
    expect_refusal("outside begin_leaf");
    reducer.begin_leaf(0, 0);
    weight.sum().backward();
    expect_refusal("two gradients");
  });
}

}  // namespace
}  // namespace lockstep
