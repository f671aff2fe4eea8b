#include <atomic>
#include <csignal>
#include <filesystem>
#include <thread>

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/flight/report.h>

namespace lockstep::flight {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const Call kAnySum{Op::kAllReduce, Dtype::kF32, Reduction::kSum, 1024, -1};

class RingTest : public ::testing::Test {
 protected:
  std::string path_ = ring_path("test" + std::to_string(::getpid()), 3);
  std::unique_ptr<Ring> ring_ = Ring::create(path_, {.rank = 3, .world_size = 8, .local_rank = 1, .local_size = 4});
  std::unique_ptr<RingReader> reader_ = RingReader::open(path_);
};

TEST_F(RingTest, AReaderSeesWhoItIs) {
  ASSERT_NE(reader_, nullptr);
  const RankReport report = reader_->read();
  EXPECT_EQ(report.rank, 3);
  EXPECT_EQ(report.world_size, 8);
  EXPECT_EQ(report.pid, ::getpid());
  EXPECT_EQ(report.liveness, Liveness::kRunning);
  EXPECT_EQ(report.step, -1);
  EXPECT_TRUE(report.calls.empty());
  EXPECT_TRUE(reader_->is_quiet());
  EXPECT_FALSE(reader_->is_gone());
}

TEST_F(RingTest, TheFileIsItsOwnersAloneAndGoesWithTheRing) {
  struct stat found {};
  ASSERT_EQ(::stat(path_.c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0600U);
  EXPECT_THROW(Ring::create(path_, {}), IoError);
  ring_.reset();
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(RingTest, ACallIsSeenFromItsBeginningToItsEnd) {
  const auto world = ring_->add_world();
  uint64_t ticket = 0;
  {
    const LabelScope label(12, "block3.attention.query.weight");
    ticket = ring_->begin(*world, kAnySum);
  }
  EXPECT_TRUE(reader_->is_quiet());  // begun is not waited for
  ring_->wait(ticket);
  EXPECT_FALSE(reader_->is_quiet());
  RankReport report = reader_->read();
  ASSERT_EQ(report.calls.size(), 1U);
  const CallReport& call = report.calls[0];
  EXPECT_EQ(call.sequence, 1U);
  EXPECT_EQ(call.group, world->id());
  EXPECT_EQ(call.call.op, Op::kAllReduce);
  EXPECT_EQ(call.call.dtype, Dtype::kF32);
  EXPECT_EQ(call.call.reduction, Reduction::kSum);
  EXPECT_EQ(call.call.count, 1024);
  EXPECT_EQ(call.call.root, -1);
  EXPECT_EQ(call.bucket, 12);
  EXPECT_EQ(call.label, "block3.attention.query.weight");
  EXPECT_FALSE(call.is_done());
  EXPECT_LT(call.begun_ago_ns, 5'000'000'000);
  ASSERT_EQ(report.waits.size(), 1U);
  EXPECT_EQ(report.waits[0].ticket, ticket);
  ASSERT_EQ(report.groups.size(), 1U);
  EXPECT_EQ(report.groups[0].begun, 1U);
  EXPECT_EQ(report.groups[0].fingerprint, call.fingerprint);
  EXPECT_EQ(report.groups[0].members.size(), 8U);

  ring_->done(ticket);
  ring_->done(ring_->begin(*world, {Op::kBroadcast, Dtype::kI64, Reduction::kNone, 0, 7}));
  report = reader_->read();
  EXPECT_TRUE(report.calls[0].is_done());
  EXPECT_TRUE(report.waits.empty());
  EXPECT_EQ(report.calls[1].label, "");
  EXPECT_EQ(report.calls[1].bucket, -1);
  EXPECT_EQ(report.calls[1].call.root, 7);
}

TEST_F(RingTest, LabelsOfAnyLengthAreCut) {
  const auto world = ring_->add_world();
  for (const size_t length : {0, 1, 7, 8, 9, 62, 63, 64, 200}) {
    const std::string text(length, 'x');
    const LabelScope label(0, text);
    ring_->begin(*world, kAnySum);
    EXPECT_EQ(reader_->read(1).calls.back().label, text.substr(0, 63));
  }
}

TEST_F(RingTest, ManyCallsLeaveTheLast) {
  const auto world = ring_->add_world();
  for (int i = 0; i < 5000; ++i) ring_->done(ring_->begin(*world, kAnySum));
  const RankReport report = reader_->read();
  ASSERT_EQ(report.calls.size(), kNumEntries);
  EXPECT_EQ(report.calls.front().sequence, 5001 - kNumEntries);
  EXPECT_EQ(report.calls.back().sequence, 5000U);
  EXPECT_EQ(reader_->read(10).calls.size(), 10U);
}

TEST_F(RingTest, GroupsHaveTheSameIdOnAllMembersAndKnowThem) {
  const std::string other_path = ring_path("test" + std::to_string(::getpid()), 5);
  const auto other = Ring::create(other_path, {.rank = 5, .world_size = 8});
  const auto mine = ring_->add_world(), theirs = other->add_world();
  EXPECT_EQ(mine->id(), theirs->id());
  const auto my_data = ring_->add_child(*mine, 1, "data", {1, 3, 5, 7}),
             their_data = other->add_child(*theirs, 1, "data", {1, 3, 5, 7});
  EXPECT_EQ(my_data->id(), their_data->id());
  const auto my_next = ring_->add_child(*mine, 1, "data", {3, 1, 0}),
             their_next = other->add_child(*theirs, 0, "data", {5});
  EXPECT_NE(my_next->id(), their_next->id());
  EXPECT_NE(my_next->id(), my_data->id());
  const RankReport report = reader_->read();
  EXPECT_THAT(report.groups[1].members, ElementsAre(1, 3, 5, 7));
  EXPECT_THAT(report.groups[2].members, ElementsAre(3, 1, 0));
  EXPECT_EQ(report.groups[1].name, "data");
}

TEST_F(RingTest, MoreGroupsThanRecordsAreStillCounted) {
  const auto world = ring_->add_world();
  std::vector<std::unique_ptr<Ring::Group>> groups;
  groups.reserve(100);
  for (int i = 0; i < 100; ++i) groups.push_back(ring_->add_child(*world, i, "g", {3, 7, 4}));
  ring_->done(ring_->begin(*groups.back(), kAnySum));
  const RankReport report = reader_->read();
  EXPECT_EQ(report.groups.size(), kMaxGroups);
  EXPECT_EQ(report.calls.back().group, 0U);
}

TEST(FingerprintTest, EachPartOfACallCounts) {
  const uint64_t start = fingerprint_after(7, kAnySum);
  EXPECT_EQ(start, fingerprint_after(7, kAnySum));
  EXPECT_NE(start, fingerprint_after(8, kAnySum));
  Call other = kAnySum;
  other.op = Op::kAllGather;
  EXPECT_NE(start, fingerprint_after(7, other));
  other = kAnySum, other.dtype = Dtype::kBf16;
  EXPECT_NE(start, fingerprint_after(7, other));
  other = kAnySum, other.count = 1025;
  EXPECT_NE(start, fingerprint_after(7, other));
  other = kAnySum, other.root = 0;
  EXPECT_NE(start, fingerprint_after(7, other));
  other = kAnySum, other.reduction = Reduction::kMax;
  EXPECT_NE(start, fingerprint_after(7, other));
  const Call gather{Op::kAllGather, Dtype::kF32, Reduction::kNone, 1024, -1};
  EXPECT_NE(fingerprint_after(fingerprint_after(7, kAnySum), gather),
            fingerprint_after(fingerprint_after(7, gather), kAnySum));
}

TEST_F(RingTest, ReadersNeverSeeATornEntry) {
  const auto world = ring_->add_world();
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (int64_t i = 1; !stop.load(std::memory_order_relaxed); ++i) {
      const std::string text(static_cast<size_t>(i % 60), static_cast<char>('a' + i % 26));
      const LabelScope label(static_cast<int32_t>(i % 100000), text);
      ring_->done(ring_->begin(*world, {Op::kAllReduce, Dtype::kF32, Reduction::kSum, i, static_cast<int32_t>(i % 7)}));
    }
  });
  size_t seen = 0;
  while (seen < 5000) {
    for (const CallReport& call : reader_->read(256).calls) {
      const auto i = static_cast<int64_t>(call.sequence);
      ASSERT_EQ(call.call.count, i);
      ASSERT_EQ(call.call.root, i % 7);
      ASSERT_EQ(call.bucket, i % 100000);
      ASSERT_EQ(call.label, std::string(static_cast<size_t>(i % 60), static_cast<char>('a' + i % 26)));
      ++seen;
    }
  }
  stop = true;
  writer.join();
}

TEST_F(RingTest, StepsAreTimedWithoutTheirWaiting) {
  const auto world = ring_->add_world();
  ring_->set_phase(Phase::kTraining);
  for (int step = 0; step <= 21; ++step) {
    ring_->set_step(step);
    const uint64_t ticket = ring_->begin(*world, kAnySum);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // computes
    ring_->wait(ticket);
    std::this_thread::sleep_for(std::chrono::milliseconds(4));
    ring_->done(ticket);
  }
  const RankReport report = reader_->read();
  EXPECT_EQ(report.step, 21);
  EXPECT_GE(report.timed_steps, 20);
  EXPECT_GE(report.step_p99_ns, 6'000'000);
  EXPECT_GE(report.compute_ns, 20 * 2'000'000);
  EXPECT_GE(report.wall_ns - report.compute_ns, 20 * 4'000'000);
}

TEST_F(RingTest, TimesOfStepsWithASaveAreLeftOut) {
  ring_->set_phase(Phase::kTraining);
  ring_->set_step(0);
  ring_->set_phase(Phase::kSaving);
  ring_->set_phase(Phase::kTraining);
  ring_->set_step(1);
  EXPECT_EQ(reader_->read().timed_steps, 0);
  ring_->set_step(2);
  EXPECT_EQ(reader_->read().timed_steps, 1);
}

TEST_F(RingTest, TheFirstCauseOfTheEndIsKept) {
  ring_->set_died(SIGSEGV);
  ring_->set_exit(70, "later");
  const RankReport report = reader_->read();
  EXPECT_EQ(report.exit_kind, 2U);
  EXPECT_EQ(report.exit_value, SIGSEGV);
  EXPECT_FALSE(report.has_ended_well());
}

TEST_F(RingTest, OrdersReachTheRank) {
  reader_->tell_to_end("rank 2 hangs");
  EXPECT_EQ(ring_->header().order.load(), static_cast<uint32_t>(Order::kEndAsHung));
  EXPECT_STREQ(ring_->header().order_text.data(), "rank 2 hangs");
}

TEST(SweepTest, RingsOfTheDeadGoAndThoseOfTheLivingStay) {
  const std::string dead = ring_path("test" + std::to_string(::getpid()), 1),
                    living = ring_path("test" + std::to_string(::getpid()), 2);
  const auto mine = Ring::create(living, {.rank = 2, .world_size = 3});
  const pid_t child = ::fork();
  if (child == 0) {
    static_cast<void>(Ring::create(dead, {.rank = 1, .world_size = 3}).release());
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  const auto reader = RingReader::open(dead);
  ASSERT_NE(reader, nullptr);
  EXPECT_TRUE(reader->is_gone());
  sweep_rings();
  EXPECT_FALSE(std::filesystem::exists(dead));
  EXPECT_TRUE(std::filesystem::exists(living));
  EXPECT_EQ(reader->read().liveness, Liveness::kGone);  // what was mapped stays readable
}

TEST(SweepTest, APidThatIsAnothersByNowIsNotTakenForTheRank) {
  const std::string path = ring_path("test" + std::to_string(::getpid()), 4);
  const auto ring = Ring::create(path, {.rank = 0, .world_size = 2});
  ring->header().pid_start_time -= 1;
  EXPECT_EQ(RingReader::open(path)->read().liveness, Liveness::kGone);
  sweep_rings();
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(LivenessTest, AStoppedProcessIsSeen) {
  const std::string path = ring_path("test" + std::to_string(::getpid()), 6);
  const pid_t child = ::fork();
  if (child == 0) {
    static_cast<void>(Ring::create(path, {.rank = 0, .world_size = 2}).release());
    for (;;) ::pause();
  }
  std::unique_ptr<RingReader> reader;
  while (!reader) reader = RingReader::open(path);
  ::kill(child, SIGSTOP);
  int status = 0;
  ::waitpid(child, &status, WUNTRACED);
  EXPECT_EQ(reader->read().liveness, Liveness::kStopped);
  ::kill(child, SIGKILL);
  while (reader->read().liveness != Liveness::kGone) std::this_thread::yield();  // a zombie counts as gone
  ::waitpid(child, &status, 0);
  ::unlink(path.c_str());
}

TEST(JobKeyTest, RanksOfAJobAgreeAndJobsDiffer) {
  const auto key = [](const std::map<std::string, std::string>& variables) {
    return job_key([&variables](const char* name) -> std::optional<std::string> {
      const auto found = variables.find(name);
      return found == variables.end() ? std::nullopt : std::optional(found->second);
    });
  };
  EXPECT_EQ(key({{"PMIX_NAMESPACE", "prterun-1"}, {"PMIX_RANK", "0"}}),
            key({{"PMIX_NAMESPACE", "prterun-1"}, {"PMIX_RANK", "1"}}));
  EXPECT_NE(key({{"PMIX_NAMESPACE", "prterun-1"}}), key({{"PMIX_NAMESPACE", "prterun-2"}}));
  EXPECT_NE(key({{"SLURM_JOB_ID", "4"}, {"SLURM_STEP_ID", "0"}}), key({{"SLURM_JOB_ID", "4"}, {"SLURM_STEP_ID", "1"}}));
  EXPECT_NE(key({{"TORCHELASTIC_RUN_ID", "a"}, {"MASTER_PORT", "1"}}),
            key({{"TORCHELASTIC_RUN_ID", "a"}, {"MASTER_PORT", "2"}}));
  EXPECT_EQ(key({}).size(), 16U);
  EXPECT_NE(ring_path(key({}), 0), ring_path(key({}), 1));
}

TEST(FlightCostTest, ACollectiveCostsTensOfNanoseconds) {
  const std::string path = ring_path("test" + std::to_string(::getpid()), 7);
  const auto ring = Ring::create(path, {.rank = 0, .world_size = 2});
  const auto world = ring->add_world();
  double best = 1e9;
  for (int round = 0; round < 20; ++round) {
    constexpr int kCalls = 10000;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCalls; ++i) {
      const uint64_t ticket = ring->begin(*world, kAnySum);
      ring->wait(ticket);
      ring->done(ticket);
    }
    best = std::min(
        best, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / kCalls);
  }
  RecordProperty("ns_per_collective", std::to_string(best));
  std::cout << "begin, wait and done: " << best << " ns\n";
#if defined(NDEBUG) && !defined(LOCKSTEP_SANITIZED)
  EXPECT_LT(best, 150);
#endif
}

}  // namespace
}  // namespace lockstep::flight
