// NcclGroup on real GPUs, a thread and a GPU for each rank, against the local group on the host. Needs one GPU; with
// more, up to four ranks.
#include <algorithm>
#include <numeric>
#include <thread>

#include <ATen/Functions.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>

#include "cuda_plugin.h"
#include "id_exchange.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;

// Runs on every rank; what it returns is compared. `device` is where its tensors belong.
using Body = std::function<std::vector<at::Tensor>(ProcessGroup& group, at::Device device)>;

class NcclTest : public testing::Test {
 protected:
  void SetUp() override {
    static const CudaState state = load_cuda_plugin();  // before torch is used: the first thing each test does
    if (!state.has_driver) GTEST_SKIP() << "no GPU: " << state.why;
    ASSERT_NE(state.plugin, nullptr) << state.why;
    plugin_ = state.plugin;
    world_size_ = std::min(4, plugin_->device_count());
    ASSERT_GT(world_size_, 0);
  }

  void run_nccl_ranks(const std::function<void(ProcessGroup&, at::Device)>& body) {
    const MeetingPlace place{.file = testing::TempDir() + "nccl_test." + std::to_string(getpid()), .job = "nccl_test"};
    std::vector<std::thread> threads;
    threads.reserve(world_size_);
    for (int rank = 0; rank < world_size_; ++rank) {
      threads.emplace_back([&, rank] {
        try {
          plugin_->set_device(rank);
          const auto share = [&](std::span<std::byte> id) { exchange_id(place, rank, world_size_, id, 60s); };
          const auto group = plugin_->make_nccl_world({rank, world_size_, rank, 60s, share});
          body(*group, at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(rank)));
          group->close();
        } catch (const std::exception& error) {
          ADD_FAILURE() << "rank " << rank << ": " << error.what();
        }
      });
    }
    for (auto& thread : threads) thread.join();
  }

  void expect_as_local(const Body& body) {
    std::vector<std::vector<at::Tensor>> expected(world_size_);
    run_local_ranks(world_size_, [&](ProcessGroup& group) { expected[group.rank()] = body(group, at::kCPU); });
    run_nccl_ranks([&](ProcessGroup& group, at::Device device) {
      const auto results = body(group, device);
      ASSERT_EQ(results.size(), expected[group.rank()].size());
      for (size_t i = 0; i < results.size(); ++i) {
        const at::Tensor ours = results[i].cpu(), theirs = expected[group.rank()][i];
        EXPECT_TRUE(at::equal(ours, theirs))
            << "result " << i << " on rank " << group.rank() << ": " << ours << " instead of " << theirs;
      }
    });
  }

  const CudaPlugin* plugin_ = nullptr;
  int world_size_ = 0;
};

// Whole numbers small enough for every dtype, so that sums are exact in any order; different on every rank.
at::Tensor numbers(int64_t numel, int64_t rank, at::ScalarType type, at::Device device) {
  return at::arange(numel).remainder(11).add(rank).to(type).to(device);
}

TEST_F(NcclTest, ReductionsEqualTheLocalGroupsForEveryDtype) {
  for (const at::ScalarType type :
       {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kInt, at::kLong, at::kByte}) {
    expect_as_local([&](ProcessGroup& group, at::Device device) {
      std::vector<at::Tensor> results;
      for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
        for (const int64_t numel : {0, 1, 5, 4096}) {
          at::Tensor x = numbers(numel, group.rank(), type, device);
          group.all_reduce(x, op).wait();
          at::Tensor piece = at::empty({numel}, x.options());
          group.reduce_scatter(piece, numbers(numel * group.size(), group.rank(), type, device), op).wait();
          results.insert(results.end(), {x, piece});
        }
      }
      return results;
    });
  }
}

TEST_F(NcclTest, GathersExchangesAndBroadcastsEqualTheLocalGroups) {
  expect_as_local([&](ProcessGroup& group, at::Device device) {
    const int64_t rank = group.rank(), size = group.size();
    at::Tensor mine = numbers(3, rank, at::kFloat, device), all = at::empty({3 * size}, mine.options());
    group.all_gather(all, mine).wait();

    std::vector<int64_t> counts(size), send_counts(size), receive_counts(size);
    for (int64_t peer = 0; peer < size; ++peer) {
      counts[peer] = 2 * peer;
      send_counts[peer] = rank + peer + 1;
      receive_counts[peer] = peer + rank + 1;
    }
    const auto total = [](const std::vector<int64_t>& list) {
      return std::accumulate(list.begin(), list.end(), int64_t{0});
    };
    at::Tensor uneven = at::empty({total(counts)}, mine.options());
    group.all_gather_uneven(uneven, numbers(counts[rank], rank, at::kFloat, device), counts).wait();
    at::Tensor exchanged = at::empty({total(receive_counts)}, mine.options());
    group
        .all_to_all(exchanged, numbers(total(send_counts), 100 * rank, at::kFloat, device), receive_counts, send_counts)
        .wait();
    at::Tensor told = numbers(7, rank, at::kLong, device);
    group.broadcast(told, group.size() - 1).wait();
    return std::vector<at::Tensor>{all, uneven, exchanged, told};
  });
}

TEST_F(NcclTest, RanksThatAllSendFirstMeet) {
  expect_as_local([&](ProcessGroup& group, at::Device device) {
    const int next = (group.rank() + 1) % group.size(), before = (group.rank() + group.size() - 1) % group.size();
    at::Tensor out = numbers(int64_t{1} << 22, group.rank(), at::kFloat, device), in = at::zeros_like(out);
    Work sent = group.send(out, next), received = group.recv(in, before);
    sent.wait();
    received.wait();
    return std::vector<at::Tensor>{in};
  });
}

TEST_F(NcclTest, HostTensorsTravelAndBarriersMeet) {
  expect_as_local([&](ProcessGroup& group, at::Device) {
    group.barrier();
    at::Tensor mine = numbers(3, group.rank(), at::kLong, at::kCPU),
               all = at::empty({int64_t{3} * group.size()}, mine.options());
    group.all_gather(all, mine).wait();
    return std::vector<at::Tensor>{all};
  });
}

TEST_F(NcclTest, WorkOfTheCallersStreamIsSeenAndSeesTheResult) {
  expect_as_local([&](ProcessGroup& group, at::Device device) {
    at::Tensor x = at::ones({1 << 20}, at::TensorOptions().device(device));
    for (int i = 0; i < 20; ++i) {
      x.mul_(2).div_(static_cast<double>(group.size()));
      group.all_reduce(x, ReduceOp::kSum).wait();
    }
    return std::vector<at::Tensor>{x};
  });
}

TEST_F(NcclTest, SplitsReduceAmongThemselves) {
  expect_as_local([&](ProcessGroup& group, at::Device device) {
    const auto part = group.split(group.rank() % 2, -group.rank(), "half");
    at::Tensor x = numbers(5, group.rank(), at::kFloat, device);
    part->all_reduce(x, ReduceOp::kSum).wait();
    at::Tensor place = at::full({1}, part->rank(), at::kLong);
    part->close();
    return std::vector<at::Tensor>{x, place};
  });
}

TEST_F(NcclTest, ARankThatStaysAwayIsATimeoutNotAHang) {
  if (world_size_ < 2) GTEST_SKIP() << "one GPU: there is no rank to stay away";
  run_nccl_ranks([&](ProcessGroup& group, at::Device device) {
    group.barrier();
    if (group.rank() == 0) {
      at::Tensor x = at::ones({4}, at::TensorOptions().device(device));
      EXPECT_THROW(
          {
            group.all_reduce(x, ReduceOp::kSum, 2s).wait();
            x.cpu();  // the host meets the kernel that hangs
            group.barrier();
          },
          CollectiveError);
    }
    group.abort();
  });
}

}  // namespace
}  // namespace lockstep
