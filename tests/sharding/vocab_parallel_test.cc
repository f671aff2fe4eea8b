// Embedding and loss over a vocabulary that is cut, against one rank.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/arithmetic.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/vocab_parallel.h>

#include "../runtime/nn/compare.h"
#include "forwarding_group.h"

namespace lockstep {
namespace {

using nn::error_of;
using nn::normal;

constexpr double kVocabBound = 1e-5;

class VocabParallelTest : public testing::TestWithParam<int> {};  // tensor-parallel size
INSTANTIATE_TEST_SUITE_P(Sizes, VocabParallelTest, testing::Values(1, 2, 3, 4));

at::Tensor spread_ids(at::IntArrayRef sizes, int64_t vocab) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return at::arange(count).mul(7919).add(1).remainder(vocab).view(sizes);
}

TEST_P(VocabParallelTest, EmbeddingIsTheRowsOfOneRank) {
  for (const int64_t vocab : {int64_t{257}, int64_t{4}}) {
    run_local_ranks(GetParam(), [&](ProcessGroup& group) {
      for (const bool sequence_parallel : {false, true}) {
        const TensorParallel tp{&group, sequence_parallel};
        VocabParallelEmbedding embedding(vocab, 6, tp);
        const int64_t length = int64_t{3} * group.size();
        const at::Tensor whole = normal({vocab, 6}, 1).requires_grad_(), ids = spread_ids({2, length}, vocab),
                         slope = normal({2, length, 6}, 2);
        const auto placement = placements(embedding, tp)[0];
        fill_part(embedding.weight, placement, [&](const at::Tensor& w) { w.detach().copy_(whole); });
        const Part tokens = sequence_part(ids.size(1), tp), rows = placement.part();
        const at::Tensor y = embedding.forward(ids), expected = at::embedding(whole, ids);
        EXPECT_TRUE(same_bits(y, expected.narrow(1, tokens.begin, tokens.size)));
        (y * slope.narrow(1, tokens.begin, tokens.size)).sum().backward();
        (expected * slope).sum().backward();
        EXPECT_LE(error_of(embedding.weight.grad(), whole.grad().narrow(0, rows.begin, rows.size)), kVocabBound);
        EXPECT_FALSE(placement.is_partial);
      }
    });
  }
}

TEST_P(VocabParallelTest, AnIdOutsideTheVocabularyIsRefused) {
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const TensorParallel tp{&group};
    VocabParallelEmbedding embedding(9, 2, tp);
    for (const int64_t id : {-1, 9}) EXPECT_ANY_THROW(embedding.forward(torch::tensor({{int64_t{0}, id}}))) << id;
    const Part rows = even_parts(9, group.size())[group.rank()];
    for (const int64_t id : {-1, 9, -99})
      EXPECT_THROW(
          vocab_parallel_cross_entropy_sum(at::ones({1, 2}), at::ones({rows.size, 2}), 9, torch::tensor({id}), tp),
          CheckFailed)
          << id;
  });
}

struct Problem {
  at::Tensor x, weight, targets;
};
Problem problem(int64_t batch, int64_t tokens, int64_t width, int64_t vocab, double scale) {
  at::Tensor targets = spread_ids({batch, tokens}, vocab).clone();
  targets.masked_fill_(at::arange(batch * tokens).remainder(5).eq(2).view({batch, tokens}), nn::kIgnore);
  return {normal({batch, tokens, width}, 1) * scale, normal({vocab, width}, 2), targets};
}

struct Outcome {
  at::Tensor loss, x_grad, weight_grad;
};
Outcome plain(const Problem& p) {
  configure_arithmetic(1);  // as the ranks' threads
  const at::Tensor x = p.x.detach().clone().requires_grad_(), weight = p.weight.detach().clone().requires_grad_();
  const at::Tensor loss = nn::linear_cross_entropy_sum(x.view({-1, x.size(2)}), weight, p.targets.reshape({-1}));
  (loss * 0.7).backward();
  return {loss.detach(), x.grad(), weight.grad()};
}
// Gradients of this rank's tokens and rows.
Outcome parallel(const Problem& p, const TensorParallel& tp) {
  const Part tokens = sequence_part(p.x.size(1), tp), rows = even_parts(p.weight.size(0), tp.size())[tp.rank()];
  const at::Tensor x = p.x.narrow(1, tokens.begin, tokens.size).clone().requires_grad_(),
                   weight = p.weight.narrow(0, rows.begin, rows.size).clone().requires_grad_();
  const at::Tensor loss = vocab_parallel_cross_entropy_sum(x, weight, p.weight.size(0), p.targets, tp);
  (loss * 0.7).backward();
  return {loss.detach(), x.grad(), weight.grad()};
}

void expect_the_plain_loss(const Problem& p, const TensorParallel& tp, const Outcome& expected, double bound) {
  const Outcome got = parallel(p, tp);
  const Part tokens = sequence_part(p.x.size(1), tp), rows = even_parts(p.weight.size(0), tp.size())[tp.rank()];
  EXPECT_LE(error_of(got.loss, expected.loss), bound);
  EXPECT_LE(error_of(got.x_grad, expected.x_grad.narrow(1, tokens.begin, tokens.size)), bound);
  EXPECT_LE(error_of(got.weight_grad, expected.weight_grad.narrow(0, rows.begin, rows.size)), bound);
  EXPECT_EQ(got.x_grad.scalar_type(), at::kFloat);
  EXPECT_EQ(got.weight_grad.scalar_type(), at::kFloat);
  at::Tensor losses = at::empty({tp.size()}, at::kFloat);
  tp.group->all_gather(losses, got.loss.view({1})).wait();
  EXPECT_TRUE(losses.eq(losses[0]).all().item<bool>()) << "ranks disagree";
}

TEST_P(VocabParallelTest, LossAndGradientsAreThoseOfTheWholeVocabulary) {
  // Rows of chunks and groups divide nothing; the last one needs several groups on any number of ranks.
  for (const Problem& p : {problem(3, 12, 7, 257, 1), problem(1, 12, 3, 5, 30), problem(2, 204, 16, 49'933, 0.3)}) {
    const Outcome expected = plain(p);
    run_local_ranks(GetParam(), [&](ProcessGroup& group) {
      for (const bool sequence_parallel : {false, true})
        expect_the_plain_loss(p, {&group, sequence_parallel}, expected, group.size() == 1 ? 0 : kVocabBound);
    });
  }
}

TEST_P(VocabParallelTest, Bf16RoundsLogitsOnly) {
  const Problem p = problem(3, 12, 16, 257, 1);
  const nn::AutocastGuard on(at::kCPU, true);
  const Outcome expected = plain(p);
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const nn::AutocastGuard here(at::kCPU, true);
    for (const bool sequence_parallel : {false, true})
      expect_the_plain_loss(p, {&group, sequence_parallel}, expected, group.size() == 1 ? 0 : 0.02);
  });
}

TEST_P(VocabParallelTest, HugeLogitsNeitherOverflowNorHideNans) {
  Problem p = problem(1, 12, 3, 11, 1e18);
  run_local_ranks(GetParam(), [&](ProcessGroup& group) {
    const Outcome got = parallel(p, {&group});
    EXPECT_TRUE(got.loss.isfinite().item<bool>());
    EXPECT_TRUE(got.x_grad.isfinite().all().item<bool>());
  });
  p.x[0][0][0] = NAN;
  run_local_ranks(GetParam(),
                  [&](ProcessGroup& group) { EXPECT_TRUE(parallel(p, {&group}).loss.isnan().item<bool>()); });
}

class GatherCountingGroup : public test::ForwardingGroup {
 public:
  using ForwardingGroup::ForwardingGroup;
  Work all_gather(at::Tensor output, at::Tensor input, Milliseconds timeout) override {
    ++gathers;
    elements += input.numel();
    return ForwardingGroup::all_gather(std::move(output), std::move(input), timeout);
  }
  Work all_reduce(at::Tensor, ReduceOp, Milliseconds) override { throw CheckFailed("the back end's own order"); }
  int64_t gathers = 0, elements = 0;
};

TEST(VocabParallelTrafficTest, ThreeNumbersARowTravelOnceForMegabytesOfLogits) {
  const Problem p = problem(2, 204, 16, 49'933, 0.3);
  run_local_ranks(2, [&](ProcessGroup& group) {
    GatherCountingGroup counting(group);
    const torch::NoGradGuard no_grad;
    const TensorParallel tp{&counting};
    const Part rows = even_parts(49'933, 2)[group.rank()];
    vocab_parallel_cross_entropy_sum(p.x, p.weight.narrow(0, rows.begin, rows.size), 49'933, p.targets, tp);
    EXPECT_EQ(counting.elements, 3 * 408);
    EXPECT_EQ(counting.gathers, 3);  // 166 rows of 24967 f32 are 16 MiB; the other rank's part alone would take 168
  });
}

}  // namespace
}  // namespace lockstep
