// What is the device's alone, on real GPUs: streams, sums folded there, and a kernel that waits for a rank that stays
// away. All else is process_group_test.cc, over the worlds of nccl_worlds.cc.
#include <cstring>
#include <thread>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/collectives/ordered_reduction.h>

#include "nccl_worlds.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;

class NcclTest : public testing::Test {
 protected:
  static void run(const std::function<void(ProcessGroup& group, at::TensorOptions device)>& body) {
    run_ranks(worlds().front(), [&](ProcessGroup& group) { body(group, at::TensorOptions().device(nccl_device())); });
  }
};

TEST_F(NcclTest, WorkOfTheCallersStreamIsSeenAndSeesTheResult) {
  run([](ProcessGroup& group, at::TensorOptions device) {
    at::Tensor x = at::ones({1 << 22}, device);
    for (int i = 0; i < 20; ++i) {
      x.mul_(2).div_(static_cast<double>(group.size()));
      group.all_reduce(x, ReduceOp::kSum).wait();
    }
    EXPECT_EQ(x.min().item<float>(), 1 << 20);
    EXPECT_EQ(x.max().item<float>(), 1 << 20);
  });
}

TEST_F(NcclTest, MemoryThatIsLetGoIsNotReusedUnderACollective) {
  run([](ProcessGroup& group, at::TensorOptions device) {
    std::vector<at::Tensor> sums;
    for (int i = 0; i < 50; ++i) {
      at::Tensor x = at::full({1 << 20}, i, device.dtype(at::kFloat));
      at::Tensor all = at::empty({(int64_t{1} << 20) * group.size()}, device);
      group.all_gather(all, x).wait();  // only the stream waits
      x.reset();
      at::full({1 << 20}, -1, device.dtype(at::kFloat));  // would lie where x was
      sums.push_back(all.sum());
    }
    for (int i = 0; i < 50; ++i) EXPECT_EQ(sums[i].item<float>(), static_cast<float>(i) * group.size() * (1 << 20));
  });
}

// Sums folded on the device have the bits of the host's tree, for every number of leaves.
TEST_F(NcclTest, OrderedSumsHaveTheHostsBits) {
  run([](ProcessGroup& group, at::TensorOptions device) {
    const auto alone = std::move(make_local_world(1)[0]);
    for (int64_t n = 1; n <= 17; ++n) {
      std::vector<at::Tensor> leaves, mine;
      for (int64_t leaf = 0; leaf < n; ++leaf) {
        at::Tensor x = at::empty({501}, at::kFloat);
        for (int64_t i = 0; i < x.numel(); ++i) {
          const double u = uniform_at(stream_key(11, "leaves"), static_cast<uint64_t>(leaf << 32 | i));
          x.mutable_data_ptr<float>()[i] =
              static_cast<float>((u - 0.5) * std::exp2(static_cast<double>((leaf * 5 + i * 3) % 17)));
        }
        leaves.push_back(x);
      }
      const LeafShare share = leaf_share(n, group.rank(), group.size());
      for (int64_t leaf = share.begin; leaf < share.end; ++leaf) mine.push_back(leaves[leaf].to(device.device()));
      const at::Tensor sum = ordered_all_reduce(group, n, mine, 501, device.dtype(at::kFloat)).cpu();
      const at::Tensor wanted = ordered_all_reduce(*alone, n, leaves, 501, at::TensorOptions(at::kFloat));
      EXPECT_EQ(std::memcmp(sum.const_data_ptr(), wanted.const_data_ptr(), sum.nbytes()), 0) << n << " leaves";
    }
  });
}

TEST_F(NcclTest, ARankThatStaysAwayIsATimeoutNotAHang) {
  run([](ProcessGroup& group, at::TensorOptions device) {
    if (group.size() == 1) return;  // nobody to stay away
    const auto part = group.split(0, group.rank(), "part");
    at::Tensor x = at::ones({4}, device);
    part->all_reduce(x).wait();  // connected: what follows is a kernel on the device that waits
    x.cpu();
    if (group.rank() > 0) {
      EXPECT_THROW(
          {
            part->all_reduce(x, ReduceOp::kSum, 2s).wait();
            x.cpu();  // the host meets the kernel that hangs
            part->barrier();
          },
          CollectiveError);
    }
    group.barrier();
    part->abort();
    part->close();
    at::Tensor y = at::ones({4}, device);
    group.all_reduce(y).wait();
    EXPECT_EQ(y.sum().item<float>(), 4.0F * static_cast<float>(group.size())) << "the parent is untouched";
  });
}

}  // namespace
}  // namespace lockstep
