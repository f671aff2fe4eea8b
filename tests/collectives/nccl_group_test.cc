// NcclGroup against a double of NCCL and the CUDA runtime: what it calls, in which order, on which stream.
#include "cuda/nccl_group.h"

#include <atomic>
#include <thread>

#include <ATen/Functions.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>

#include "nccl_double/nccl_double.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::AnyOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::StartsWith;
using namespace std::chrono_literals;

// Host tensors play the device's, those that were announced.
class FakeTorch : public TorchDevice {
 public:
  cudaStream_t current_stream() const override { return NcclDouble::current_stream(); }
  bool holds(const at::Tensor& tensor) const override {
    return NcclDouble::get().name_of(tensor.data_ptr()) != "unknown" || tensor.numel() == 0;
  }
  void keep_for(const at::Tensor& tensor, cudaStream_t stream) const override {
    NcclDouble::get().record("keep(" + NcclDouble::get().name_of(tensor.data_ptr()) + ", " +
                             NcclDouble::get().name_of(stream) + ")");
  }
};

class NcclGroupTest : public testing::Test {
 protected:
  void SetUp() override { double_.reset(); }
  void TearDown() override {
    group_.reset();
    EXPECT_THAT(double_.live(), IsEmpty());
  }

  // Rank 1 of 3 unless told otherwise, with nothing recorded.
  ProcessGroup& join(int rank = 1, int size = 3, Milliseconds timeout = 5s) {
    double_.rank = rank;
    double_.size = size;
    double_.device = 2;
    const NcclWorld world{rank, size, /*device=*/2, timeout,
                          [](std::span<std::byte> id) { std::fill(id.begin(), id.end(), std::byte{'s'}); }};
    group_ = make_nccl_group(world, std::make_shared<FakeTorch>(), /*watch_interval=*/5ms);
    double_.take();
    return *group_;
  }

  static at::Tensor device_tensor(const std::string& name, int64_t numel, at::ScalarType type = at::kFloat) {
    at::Tensor tensor = at::zeros({numel}, type);
    NcclDouble::get().call_it(name, tensor.data_ptr(), tensor.nbytes());
    return tensor;
  }

  template <typename Call>
  static std::string message_of(Call call, ExitCode code = ExitCode::kRunAgain) {
    try {
      call();
    } catch (const CollectiveError& error) {
      EXPECT_EQ(error.exit_code(), code) << error.what();
      return error.what();
    }
    ADD_FAILURE() << "no CollectiveError";
    return "";
  }

  template <typename Condition>
  static bool comes_true(Condition condition) {
    for (int i = 0; i < 1000; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(5ms);
    }
    return false;
  }

  NcclDouble& double_ = NcclDouble::get();
  std::unique_ptr<ProcessGroup> group_;
};

TEST_F(NcclGroupTest, ConnectsWithoutBlockingByTheIdThatWasShared) {
  double_.polls_before_settled = 3;
  join();
  EXPECT_EQ(group_->rank(), 1);
  EXPECT_EQ(group_->size(), 3);
  EXPECT_STREQ(group_->backend(), "nccl");
  EXPECT_EQ(group_->name(), "world");
  EXPECT_EQ(double_.count("ncclGetUniqueId"), 0);
  EXPECT_EQ(double_.count("ncclCommGetAsyncError"), 4);
  double_.reset();
  const NcclWorld world{1, 3, 2, 5s, [](std::span<std::byte> id) { std::fill(id.begin(), id.end(), std::byte{'s'}); }};
  const auto other = make_nccl_group(world, std::make_shared<FakeTorch>());
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre("ncclCommInitRankConfig(1 of 3, id ss, blocking 0, world)"));
}

TEST_F(NcclGroupTest, RankZeroDrawsTheIdAndALonelyRankSharesNothing) {
  const NcclWorld world{0, 1, 2, 5s, nullptr};
  const auto group = make_nccl_group(world, std::make_shared<FakeTorch>());
  EXPECT_THAT(double_.take({"nccl"}),
              ElementsAre("ncclGetUniqueId()", "ncclCommInitRankConfig(0 of 1, id ii, blocking 0, world)"));
}

TEST_F(NcclGroupTest, AnOlderLibraryThanTheHeadersIsRefused) {
  double_.version = NCCL_VERSION_CODE - 1;
  EXPECT_THROW(join(), ConfigError);
}

TEST_F(NcclGroupTest, ACollectiveFollowsTheCallersStreamAndTheCallersStreamFollowsIt) {
  at::Tensor x = device_tensor("x", 5);
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.all_reduce(x, ReduceOp::kMax);
  EXPECT_THAT(double_.take(), ElementsAre("cudaEventRecord(event1, current)", "cudaStreamWaitEvent(stream1, event1)",
                                          "keep(x, stream1)", "ncclAllReduce(x to x, 5 f32 max, comm1, stream1)",
                                          "cudaEventRecord(event2, stream1)"));
  int device = -1;
  cudaGetDevice(&device);
  EXPECT_EQ(device, 0) << "the caller's device did not come back";
  EXPECT_FALSE(work.poll());
  work.wait();  // the event has not come: the host goes on, the stream waits
  EXPECT_THAT(double_.take({"cudaStreamWaitEvent"}), ElementsAre("cudaStreamWaitEvent(current, event2)"));
  work.wait();
  EXPECT_THAT(double_.take(), IsEmpty());
  double_.set([](NcclDouble& d) { d.events_stay_pending = false; });
}

TEST_F(NcclGroupTest, EachOperationSaysWhatItMoves) {
  ProcessGroup& group = join();
  at::Tensor whole = device_tensor("whole", 6, at::kBFloat16), piece = device_tensor("piece", 2, at::kBFloat16);
  group.reduce_scatter(piece, whole, ReduceOp::kSum).wait();
  group.all_gather(whole, piece).wait();
  group.all_gather(whole, whole.narrow(0, 2, 2)).wait();
  group.broadcast(whole, 2).wait();
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre("ncclReduceScatter(whole to piece, 2 bf16 sum, comm1, stream1)",
                                                  "ncclAllGather(piece to whole, 2 bf16, comm1, stream1)",
                                                  "ncclAllGather(whole+4 bytes to whole, 2 bf16, comm1, stream1)",
                                                  "ncclBroadcast(whole to whole, 6 bf16, root 2, comm1, stream1)"));
}

TEST_F(NcclGroupTest, EveryDtypeAndReductionHasItsNclName) {
  ProcessGroup& group = join();
  const std::pair<at::ScalarType, const char*> types[] = {
      {at::kFloat, "f32"}, {at::kDouble, "f64"}, {at::kBFloat16, "bf16"}, {at::kHalf, "f16"},
      {at::kInt, "i32"},   {at::kLong, "i64"},   {at::kByte, "u8"}};
  const std::pair<ReduceOp, const char*> ops[] = {
      {ReduceOp::kSum, "sum"}, {ReduceOp::kMax, "max"}, {ReduceOp::kMin, "min"}};
  for (const auto& [type, type_name] : types) {
    for (const auto& [op, op_name] : ops) {
      group.all_reduce(device_tensor("x", 3, type), op).wait();
      EXPECT_THAT(double_.take({"ncclAllReduce"}),
                  ElementsAre(HasSubstr(std::string("3 ") + type_name + " " + op_name)));
    }
  }
  EXPECT_THROW(group.all_reduce(device_tensor("x", 3, at::kBool), ReduceOp::kSum), CheckFailed);
  EXPECT_THAT(double_.take({"nccl"}), IsEmpty());
}

TEST_F(NcclGroupTest, CountsPassTwoToTheThirtyOne) {
  ProcessGroup& group = join();
  const int64_t numel = (int64_t{1} << 31) + 5;
  char anchor = 0;  // only the address travels
  const at::Tensor x = at::from_blob(&anchor, {numel}, at::kByte);
  double_.call_it("x", &anchor, 1);
  group.all_reduce(x, ReduceOp::kSum).wait();
  group.send(x, 0).wait();
  EXPECT_THAT(double_.take({"nccl"}),
              ElementsAre("ncclAllReduce(x to x, 2147483653 u8 sum, comm1, stream1)", "ncclGroupStart()",
                          "ncclSend(x, 2147483653 u8, to 0, comm1, stream1)", "ncclGroupEnd()"));
}

TEST_F(NcclGroupTest, AnUnevenGatherIsOneGroupOfSendsAndReceives) {
  ProcessGroup& group = join(1, 4);
  at::Tensor mine = device_tensor("mine", 2, at::kLong), all = device_tensor("all", 10, at::kLong);
  const std::vector<int64_t> counts{3, 2, 0, 5};
  group.all_gather_uneven(all, mine, counts).wait();
  EXPECT_THAT(double_.take({"nccl", "cudaMemcpy"}),
              ElementsAre("cudaMemcpyAsync(mine to all+24 bytes, 16 within, stream1)", "ncclGroupStart()",
                          "ncclSend(mine, 2 i64, to 2, comm1, stream1)", "ncclRecv(all, 3 i64, from 0, comm1, stream1)",
                          "ncclSend(mine, 2 i64, to 3, comm1, stream1)",
                          "ncclRecv(all+40 bytes, 5 i64, from 3, comm1, stream1)",
                          "ncclSend(mine, 2 i64, to 0, comm1, stream1)", "ncclGroupEnd()"));
  group.all_gather_uneven(all, all.narrow(0, 3, 2), counts).wait();  // in place: nothing to copy
  EXPECT_THAT(double_.take({"cudaMemcpy"}), IsEmpty());
}

TEST_F(NcclGroupTest, ARankThatBringsNothingToAnUnevenGatherOnlyReceives) {
  ProcessGroup& group = join(2, 3);
  at::Tensor all = device_tensor("all", 4);
  group.all_gather_uneven(all, at::empty({0}), std::vector<int64_t>{1, 3, 0}).wait();
  EXPECT_THAT(double_.take({"nccl", "cudaMemcpy"}),
              ElementsAre("ncclGroupStart()", "ncclRecv(all+4 bytes, 3 f32, from 1, comm1, stream1)",
                          "ncclRecv(all, 1 f32, from 0, comm1, stream1)", "ncclGroupEnd()"));
}

TEST_F(NcclGroupTest, AnAllToAllSendsEachPieceFromItsPlaceToItsPlace) {
  ProcessGroup& group = join();
  at::Tensor input = device_tensor("input", 7), output = device_tensor("output", 6);
  group.all_to_all(output, input, std::vector<int64_t>{1, 2, 3}, std::vector<int64_t>{4, 2, 1}).wait();
  EXPECT_THAT(
      double_.take({"nccl", "cudaMemcpy"}),
      ElementsAre("cudaMemcpyAsync(input+16 bytes to output+4 bytes, 8 within, stream1)", "ncclGroupStart()",
                  "ncclSend(input+24 bytes, 1 f32, to 2, comm1, stream1)",
                  "ncclRecv(output, 1 f32, from 0, comm1, stream1)", "ncclSend(input, 4 f32, to 0, comm1, stream1)",
                  "ncclRecv(output+12 bytes, 3 f32, from 2, comm1, stream1)", "ncclGroupEnd()"));
  EXPECT_THROW(group.all_to_all(output, input, std::vector<int64_t>{1, 2, 3}, std::vector<int64_t>{4, 1, 2}),
               CheckFailed);
}

TEST_F(NcclGroupTest, SendsAndReceivesLeaveTogetherSoThatRanksThatBothSendFirstMeet) {
  ProcessGroup& group = join();
  at::Tensor out = device_tensor("out", 4), in = device_tensor("in", 4);
  Work sent = group.send(out, 2, /*tag=*/7), received = group.recv(in, 0, /*tag=*/7);
  EXPECT_THAT(double_.take({"nccl"}), IsEmpty());
  sent.wait();
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre("ncclGroupStart()", "ncclSend(out, 4 f32, to 2, comm1, stream1)",
                                                  "ncclRecv(in, 4 f32, from 0, comm1, stream1)", "ncclGroupEnd()"));
  received.wait();
  EXPECT_THAT(double_.take({"nccl"}), IsEmpty());
}

TEST_F(NcclGroupTest, ASendFollowsTheStreamFromItsCallNotFromItsLeaving) {
  ProcessGroup& group = join();
  Work sent = group.send(device_tensor("out", 4), 2);
  EXPECT_THAT(double_.take({"cudaEvent", "cudaStreamWait"}),
              ElementsAre("cudaEventRecord(event1, current)", "cudaStreamWaitEvent(stream1, event1)"));
  group.broadcast(device_tensor("x", 1), 0).wait();  // any other call lets it go first
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre("ncclGroupStart()", StartsWith("ncclSend(out"), "ncclGroupEnd()",
                                                  StartsWith("ncclBroadcast(x")));
  sent.wait();
}

TEST_F(NcclGroupTest, EmptyTensorsTravelTooAndWrongOnesDoNot) {
  ProcessGroup& group = join();
  group.all_reduce(at::zeros({0}), ReduceOp::kSum).wait();
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre(HasSubstr(", 0 f32 sum")));
  const at::Tensor transposed = device_tensor("x", 6).view({2, 3}).t();
  EXPECT_THROW(group.all_reduce(transposed, ReduceOp::kSum), CheckFailed);
  EXPECT_THROW(group.all_gather(device_tensor("all", 5), device_tensor("x", 2)), CheckFailed);
  EXPECT_THROW(group.reduce_scatter(device_tensor("x", 2), device_tensor("all", 5), ReduceOp::kSum), CheckFailed);
  EXPECT_THROW(group.broadcast(device_tensor("x", 2), 3), CheckFailed);
  EXPECT_THROW(group.send(device_tensor("x", 2), -1), CheckFailed);
  EXPECT_THAT(double_.take({"nccl"}), IsEmpty());
}

TEST_F(NcclGroupTest, AHostTensorTravelsByWayOfTheDeviceAndIsBackAfterWait) {
  ProcessGroup& group = join();
  at::Tensor host = at::full({2}, 7, at::kLong);
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.broadcast(host, 0);
  EXPECT_THAT(double_.take({"nccl", "cudaM"}),
              ElementsAre("cudaMallocAsync(16, stream1)", "cudaMemcpyAsync(unknown to memory1, 16 in, stream1)",
                          "ncclBroadcast(memory1 to memory1, 2 i64, root 0, comm1, stream1)"));
  EXPECT_FALSE(work.poll());
  std::thread gpu([&] {
    std::this_thread::sleep_for(20ms);
    double_.set([](NcclDouble& d) { d.events_stay_pending = false; });
  });
  work.wait();
  EXPECT_THAT(
      double_.take({"cudaMemcpy", "cudaStream"}),  // beside stream1, where a later operation may wait for a peer
      ElementsAre("cudaMemcpyAsync(memory1 to unknown, 16 out, stream2)", "cudaStreamSynchronize(stream2)"));
  EXPECT_TRUE(host.eq(7).all().item<bool>());
  gpu.join();
}

TEST_F(NcclGroupTest, ABarrierReturnsOnlyWhenTheDeviceHasPassedIt) {
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  std::atomic<bool> is_open{false};
  std::thread gpu([&] {
    std::this_thread::sleep_for(30ms);
    is_open = true;
    double_.set([](NcclDouble& d) { d.events_stay_pending = false; });
  });
  group.barrier();
  EXPECT_TRUE(is_open);
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre(StartsWith("ncclAllReduce(memory1 to memory1, 1 i32 sum")));
  gpu.join();
}

TEST_F(NcclGroupTest, ASplitPassesColorKeyAndNameAndGetsAStreamOfItsOwn) {
  ProcessGroup& group = join();
  double_.polls_before_settled = 2;
  double_.rank = 0;
  double_.size = 2;
  const auto part = group.split(/*color=*/4, /*key=*/9, "tensor");
  EXPECT_EQ(part->rank(), 0);
  EXPECT_EQ(part->size(), 2);
  EXPECT_EQ(part->name(), "tensor");
  part->all_reduce(device_tensor("x", 1), ReduceOp::kSum).wait();
  EXPECT_THAT(
      double_.take({"nccl", "cudaStreamCreate"}),  // one to work in, one to fetch by
      ElementsAre("ncclCommSplit(comm1, color 4, key 9, blocking 0, tensor)",
                  "cudaStreamCreateWithPriority(1, -5, device 2)", "cudaStreamCreateWithPriority(1, -5, device 2)",
                  "ncclAllReduce(x to x, 1 f32 sum, comm2, stream3)"));
  EXPECT_THROW(group.split(-1, 0, "nobody"), CheckFailed);
}

TEST_F(NcclGroupTest, WorkIsTakenOverBeforeItsEventIsRecorded) {
  ProcessGroup& group = join();
  double_.never_settles = true;
  std::thread nccl([&] {
    std::this_thread::sleep_for(30ms);
    EXPECT_THAT(double_.calls(), Not(Contains(HasSubstr("cudaEventRecord(event2"))));
    double_.set([](NcclDouble& d) { d.never_settles = false; });
  });
  Work work = group.all_reduce(device_tensor("x", 1), ReduceOp::kSum);
  nccl.join();
  EXPECT_THAT(double_.calls(), Contains(HasSubstr("cudaEventRecord(event2")));
  work.wait();
}

TEST_F(NcclGroupTest, ACallThatNobodyJoinsTimesOutAndAbortsOnce) {
  ProcessGroup& group = join();
  double_.never_settles = true;
  const std::string message = message_of([&] { group.all_reduce(device_tensor("x", 5), ReduceOp::kSum, 40ms); });
  EXPECT_THAT(message,
              AllOf(StartsWith("[rank 1/3] all_reduce of 5 Float (call 1) in group world timed out after 40 ms"),
                    HasSubstr("Mend: ")));
  group.abort();  // too late to be the reason
  EXPECT_THAT(message_of([&] { group.barrier(); }),
              AllOf(HasSubstr("group world is unusable"), HasSubstr("timed out after 40 ms")));
  group.close();  // the error was told: only resources go
  group_.reset();
  EXPECT_EQ(double_.count("ncclCommAbort"), 1);
  EXPECT_EQ(double_.count("ncclCommDestroy") + double_.count("ncclCommFinalize"), 0);
}

TEST_F(NcclGroupTest, AConnectionThatNobodyJoinsTimesOut) {
  double_.never_settles = true;
  EXPECT_THAT(message_of([&] { join(1, 3, 40ms); }), AllOf(HasSubstr("[rank 1/3] connecting group world timed out")));
  EXPECT_EQ(double_.count("ncclCommAbort"), 1);
}

TEST_F(NcclGroupTest, AKernelThatHangsIsFoundWithoutAnyoneWaitingAndCloseSaysSo) {
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.all_reduce(device_tensor("x", 5), ReduceOp::kSum, 60ms);
  work.wait();  // handed to the stream; the host has gone on
  const int asked = double_.count("cudaEventQuery");
  EXPECT_TRUE(comes_true([&] { return double_.count("ncclCommAbort") == 1; }));
  EXPECT_EQ(double_.count("cudaEventQuery"), asked) << "who finds it may not wait for the driver";
  EXPECT_THAT(message_of([&] { group.close(); }),
              HasSubstr("[rank 1/3] all_reduce of 5 Float (call 1) in group world timed out after 60 ms"));
  group.close();
  EXPECT_EQ(double_.count("ncclCommAbort"), 1);
}

TEST_F(NcclGroupTest, WaitThrowsWhenItsDeadlineHasPassed) {
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.recv(device_tensor("x", 5), 2, 0, 30ms);
  Work other = group.send(device_tensor("y", 2), 0, 0, 5s);
  EXPECT_FALSE(work.poll());
  std::this_thread::sleep_for(60ms);
  EXPECT_THAT(message_of([&] { other.wait(); }),
              AllOf(HasSubstr("send of 2 Float to 0, with recv of 5 Float from 2"), HasSubstr("after 30 ms")));
}

TEST_F(NcclGroupTest, OfThoseThatLeaveTogetherTheFirstDeadlineCounts) {
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.recv(device_tensor("x", 5), 2, 0, 5s), other = group.send(device_tensor("y", 2), 0, 0, 30ms);
  EXPECT_FALSE(work.poll());
  std::this_thread::sleep_for(60ms);
  EXPECT_THAT(message_of([&] { work.wait(); }), HasSubstr("after 30 ms"));
}

TEST_F(NcclGroupTest, ALostPeerIsNamedWithNcclsWords) {
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.all_reduce(device_tensor("x", 5), ReduceOp::kSum);
  double_.set([](NcclDouble& d) { d.async_error = ncclRemoteError; });
  EXPECT_TRUE(comes_true([&] { return double_.count("ncclCommAbort") == 1; }));
  EXPECT_THAT(message_of([&] { work.wait(); }),
              AllOf(HasSubstr("[rank 1/3] all_reduce of 5 Float (call 1) in group world failed"),
                    HasSubstr("remote process exited: connection closed by peer")));
}

TEST_F(NcclGroupTest, ErrorsOfACallMapToWhoCanMendThem) {
  const struct {
    const char* function;
    ncclResult_t result;
    ExitCode code;
  } cases[] = {{"ncclAllReduce", ncclRemoteError, ExitCode::kRunAgain},
               {"ncclAllReduce", ncclSystemError, ExitCode::kRunAgain},
               {"ncclAllReduce", ncclInvalidUsage, ExitCode::kBug},
               {"ncclAllReduce", ncclInvalidArgument, ExitCode::kBug}};
  for (const auto& one : cases) {
    double_.reset();
    ProcessGroup& group = join();
    double_.results[one.function] = one.result;
    message_of([&] { group.all_reduce(device_tensor("x", 5), ReduceOp::kSum); }, one.code);
    EXPECT_EQ(double_.count("ncclCommAbort"), 1);
    group_.reset();
  }
}

TEST_F(NcclGroupTest, TwoRanksOnOneGpuAreAConfigurationMistake) {
  double_.results["ncclCommInitRankConfig"] = ncclInvalidUsage;
  EXPECT_THAT(message_of([&] { join(); }, ExitCode::kConfig),
              HasSubstr("connecting group world failed: invalid usage"));
}

TEST_F(NcclGroupTest, AnErrorInsideAGroupCallStillEndsTheGroupCall) {
  ProcessGroup& group = join();
  double_.results["ncclRecv"] = ncclSystemError;
  Work sent = group.send(device_tensor("out", 1), 0), received = group.recv(device_tensor("in", 1), 0);
  EXPECT_THAT(message_of([&] { sent.wait(); }), HasSubstr("recv of 1 Float from 0, with send of 1 Float to 0"));
  EXPECT_THAT(double_.take({"ncclGroup"}), ElementsAre("ncclGroupStart()", "ncclGroupEnd()"));
  message_of([&] { received.wait(); });
}

TEST_F(NcclGroupTest, ABadDeviceIsTheNodesFault) {
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.all_reduce(device_tensor("x", 5), ReduceOp::kSum);
  double_.set([](NcclDouble& d) { d.event_error = cudaErrorECCUncorrectable; });
  EXPECT_THAT(message_of([&] { work.wait(); }, ExitCode::kNodeBad), HasSubstr("cudaErrorECCUncorrectable"));
  EXPECT_EQ(double_.count("ncclCommAbort"), 1);
}

TEST_F(NcclGroupTest, AbortFromAnotherThreadEndsWaitsAndSplits) {
  ProcessGroup& group = join();
  const auto part = group.split(0, 0, "data");
  double_.never_settles = true;
  std::thread other([&] {
    std::this_thread::sleep_for(30ms);
    group.abort();
    group.abort();
  });
  EXPECT_THAT(message_of([&] { group.all_reduce(device_tensor("x", 5), ReduceOp::kSum, 5s); }),
              HasSubstr("it was aborted"));
  other.join();
  EXPECT_THAT(message_of([&] { part->barrier(); }), HasSubstr("group data is unusable: it was aborted"));
  EXPECT_THAT(double_.take({"ncclCommAbort"}), ElementsAre("ncclCommAbort(comm1)", "ncclCommAbort(comm2)"));
  part->close();
  group.close();
  EXPECT_THAT(double_.take({"nccl"}), IsEmpty());
}

TEST_F(NcclGroupTest, AfterAbortCloseSendsNothingThatHadNotLeft) {
  ProcessGroup& group = join();
  Work sent = group.send(device_tensor("out", 1), 0);
  group.abort();
  EXPECT_NO_THROW(group.close());
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre("ncclCommAbort(comm1)"));
}

TEST_F(NcclGroupTest, CloseFinalizesAndDestroysOnceAllIsThrough) {
  ProcessGroup& group = join();
  Work sent = group.send(device_tensor("out", 1), 0);
  group.close();
  group.close();
  EXPECT_THAT(double_.take({"nccl"}), ElementsAre("ncclGroupStart()", StartsWith("ncclSend(out"), "ncclGroupEnd()",
                                                  "ncclCommFinalize(comm1)", "ncclCommDestroy(comm1)"));
  group_.reset();
  EXPECT_EQ(double_.count("ncclCommAbort"), 0);
}

TEST_F(NcclGroupTest, CloseWaitsForWhatIsInFlight) {
  ProcessGroup& group = join();
  double_.set([](NcclDouble& d) { d.events_stay_pending = true; });
  Work work = group.all_reduce(device_tensor("x", 5), ReduceOp::kSum);
  std::thread gpu([&] {
    std::this_thread::sleep_for(30ms);
    EXPECT_EQ(double_.count("ncclCommFinalize"), 0);
    double_.set([](NcclDouble& d) { d.events_stay_pending = false; });
  });
  group.close();
  EXPECT_EQ(double_.count("ncclCommDestroy"), 1);
  gpu.join();
}

TEST_F(NcclGroupTest, ADestructorThatFindsItOpenAborts) {
  join();
  group_.reset();
  EXPECT_THAT(double_.take({"ncclComm", "cudaStreamDestroy"}),
              ElementsAre("ncclCommAbort(comm1)", "cudaStreamDestroy(stream2)", "cudaStreamDestroy(stream1)"));
}

}  // namespace
}  // namespace lockstep
