#include <chrono>
#include <cstdio>
#include <cstring>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/sharding/replica_check.h>

namespace lockstep {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr int64_t kInterval = 7;

// Odd sizes, an empty one, and two dtypes.
std::vector<ReplicaCheck::Part> replica() {
  std::vector<ReplicaCheck::Part> parts;
  for (const int64_t numel : {1, 0, 1'003, 17, 5'000, 64}) {
    const auto type = numel == 17 ? at::kBFloat16 : at::kFloat;
    parts.push_back({"layer" + std::to_string(parts.size()), at::arange(numel, at::kFloat).to(type)});
  }
  return parts;
}

void flip(const at::Tensor& tensor, int64_t bit) {
  static_cast<uint8_t*>(tensor.data_ptr())[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
}

// What every replica does to its tensors in a step.
void update(std::vector<ReplicaCheck::Part>& parts, int64_t step) {
  for (auto& part : parts) part.tensor.add_(static_cast<double>(step % 3) - 1);
}

std::vector<uint64_t> gathered(ProcessGroup& group, uint64_t digest) {
  const std::string all = all_gather_bytes(group, std::as_bytes(std::span(&digest, 1)));
  std::vector<uint64_t> digests(static_cast<size_t>(group.size()));
  std::memcpy(digests.data(), all.data(), all.size());
  return digests;
}

TEST(ReplicaCheckTest, OneFlippedBitIsFoundWithinAnIntervalAndTheRightRankNamed) {
  for (uint64_t trial = 0; trial < 20; ++trial) {
    const auto draw = [&](uint64_t what, int64_t below) {
      LOCKSTEP_CHECK(below > 0) << "nothing to draw from";
      return static_cast<int64_t>(stream_key(trial, what) % static_cast<uint64_t>(below));
    };
    const int64_t bad_rank = draw(0, 4), flip_step = draw(1, 2 * kInterval);
    run_local_ranks(4, [&](ProcessGroup& group) {
      auto parts = replica();
      const ReplicaCheck check(parts, kInterval);
      // Any bit of any tensor, with equal chance.
      int64_t bit = draw(2, 8 * check.total_bytes());
      size_t part = 0;
      while (bit >= static_cast<int64_t>(8 * parts[part].tensor.nbytes())) {
        bit -= static_cast<int64_t>(8 * parts[part++].tensor.nbytes());
      }
      int64_t found = -1;
      for (int64_t step = 0; step < flip_step + kInterval; ++step) {
        if (step == flip_step && group.rank() == bad_rank) flip(parts[part].tensor, bit);
        const auto verdict = judge(gathered(group, check.digest_for(step)));
        if (verdict.is_alike()) continue;
        found = step;
        EXPECT_THAT(verdict.suspects, ElementsAre(static_cast<int>(bad_rank)));
        EXPECT_TRUE(verdict.is_certain);
        EXPECT_THAT(check.describe(check.bucket_of(step)), HasSubstr("layer"));
        break;
      }
      EXPECT_GE(found, flip_step) << "trial " << trial;
    });
  }
}

TEST(ReplicaCheckTest, CleanReplicasNeverRaiseAnAlarm) {
  for (const int world_size : {1, 2, 3, 4}) {
    run_local_ranks(world_size, [](ProcessGroup& group) {
      auto parts = replica();
      const ReplicaCheck check(parts, kInterval);
      for (int64_t step = 0; step < 500; ++step) {
        update(parts, step);
        EXPECT_TRUE(judge(gathered(group, check.digest_for(step))).is_alike()) << step;
      }
    });
  }
}

TEST(ReplicaCheckTest, EveryByteIsInExactlyOneBucketOfAnInterval) {
  for (const int64_t interval : {1L, 2L, 7L, 50L, 100'000L}) {
    auto parts = replica();
    const ReplicaCheck check(parts, interval);
    std::vector<uint64_t> clean;
    const int64_t hashed = std::min<int64_t>(interval, 200);  // the rest of 100,000 would take long
    for (int64_t step = 0; step < hashed; ++step) clean.push_back(check.digest_for(step));
    for (const auto& part : parts) {
      for (const int64_t byte : {int64_t{0}, static_cast<int64_t>(part.tensor.nbytes()) - 1}) {
        if (byte < 0 || part.tensor.nbytes() == 0) continue;
        flip(part.tensor, 8 * byte + 3);
        int changed = 0;
        for (int64_t step = 0; step < hashed; ++step) changed += check.digest_for(step) != clean[step];
        if (interval == hashed) {
          EXPECT_EQ(changed, 1) << part.name << " byte " << byte << " of interval " << interval;
        }
        flip(part.tensor, 8 * byte + 3);
      }
    }
    EXPECT_EQ(check.digest_for(interval), clean[0]) << "in turn";
  }
}

TEST(ReplicaCheckTest, BucketsAreOfOneSizeAndNamed) {
  const ReplicaCheck check({{"a", at::zeros({10})}, {"b", at::zeros({15})}}, 4);  // 100 bytes
  EXPECT_EQ(check.describe(0), "bucket 0 of 4: 25 bytes, a from byte 0");
  EXPECT_EQ(check.describe(1), "bucket 1 of 4: 25 bytes, a from byte 25 to b");
  EXPECT_EQ(check.describe(3), "bucket 3 of 4: 25 bytes, b from byte 35");
  EXPECT_EQ(ReplicaCheck({}, 4).digest_for(2), ReplicaCheck({}, 4).digest_for(2));
  EXPECT_THROW(ReplicaCheck({{"t", at::zeros({2, 3}).t()}}, 4), CheckFailed);
  EXPECT_THROW(ReplicaCheck({}, 0), CheckFailed);
}

std::vector<int> suspects(const std::vector<uint64_t>& digests) { return judge(digests).suspects; }

TEST(ReplicaCheckTest, TheVerdictNamesTheMinorityOrElseAll) {
  EXPECT_THAT(suspects({}), IsEmpty());
  EXPECT_THAT(suspects({5}), IsEmpty());
  EXPECT_THAT(suspects({5, 5, 5, 5, 5, 5, 5, 5}), IsEmpty());
  EXPECT_THAT(suspects({5, 6}), ElementsAre(0, 1));
  EXPECT_THAT(suspects({5, 6, 5}), ElementsAre(1));
  EXPECT_THAT(suspects({5, 6, 7}), ElementsAre(0, 1, 2));
  EXPECT_THAT(suspects({5, 6, 6, 5}), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(suspects({5, 6, 6, 7}), ElementsAre(0, 3)) << "two that agree cannot both be wrong by chance";
  EXPECT_THAT(suspects({5, 5, 5, 6, 5, 5, 5}), ElementsAre(3));
  EXPECT_THAT(suspects({0, 5, 5, 6, 6, 5, 5, 5}), ElementsAre(0, 3, 4));
  EXPECT_FALSE(judge(std::vector<uint64_t>{5, 6}).is_certain);
  EXPECT_FALSE(judge(std::vector<uint64_t>{5, 6, 6, 5}).is_certain);
  EXPECT_TRUE(judge(std::vector<uint64_t>{5, 6, 5}).is_certain);
}

// --gtest_also_run_disabled_tests --gtest_filter=*Cost*
TEST(ReplicaCheckTest, DISABLED_CostOfADigest) {
  const ReplicaCheck check({{"all", at::zeros({64 << 20})}}, 1);
  double best = 1e9;
  for (int round = 0; round < 10; ++round) {
    const auto start = std::chrono::steady_clock::now();
    check.digest_for(0);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("%.1f GB/s\n", static_cast<double>(check.total_bytes()) / best / 1e9);
}

}  // namespace
}  // namespace lockstep
