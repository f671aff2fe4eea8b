// What every back end must do: the same bodies on threads and under mpirun. Collectives that are meant to fail have
// short limits; all others have the default, so that a busy machine fails no test.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/arithmetic.h>

#include "numbers.h"
#include "worlds.h"

namespace lockstep {
namespace {

using std::chrono::steady_clock;
using testing::HasSubstr;

constexpr Milliseconds kSoon{60};

class ProcessGroupTest : public testing::TestWithParam<World> {
 protected:
  static void run(const std::function<void(ProcessGroup&)>& body) { run_ranks(GetParam(), body); }

  // `body` for every dtype and size; failures inside name both.
  static void run_all(const std::function<void(ProcessGroup&, at::ScalarType, int64_t numel)>& body) {
    run([&](ProcessGroup& group) {
      for (const at::ScalarType dtype : kDtypes) {
        for (const int64_t numel : sizes_for(group.size(), GetParam().many())) {
          SCOPED_TRACE(std::string(at::toString(dtype)) + " " + std::to_string(numel) + " on rank " +
                       std::to_string(group.rank()) + " of " + std::to_string(group.size()));
          body(group, dtype, numel);
        }
      }
    });
  }
};

std::string message_of(const std::function<void()>& call) {  // of a CollectiveError; others pass through
  try {
    call();
  } catch (const CollectiveError& error) {
    return error.what();
  }
  return "no CollectiveError";
}

int64_t reduced(int ranks, ReduceOp op, int64_t i) {
  int64_t result = term(0, i);
  for (int rank = 1; rank < ranks; ++rank) {
    const int64_t next = term(rank, i);
    result = op == ReduceOp::kSum   ? result + next
             : op == ReduceOp::kMax ? std::max(result, next)
                                    : std::min(result, next);
  }
  return result;
}

TEST_P(ProcessGroupTest, RanksCountFromZeroAndKnowTheirGroup) {
  run([](ProcessGroup& group) {
    EXPECT_EQ(group.size(), GetParam().size);
    EXPECT_EQ(group.name(), "world");
    EXPECT_EQ(GetParam().name.rfind(group.backend(), 0), 0U) << group.backend();
    at::Tensor seen = at::zeros({group.size()}, at::kInt);
    seen[group.rank()].fill_(1);
    group.all_reduce(seen).wait();
    EXPECT_EQ(difference(seen, made(group.size(), at::kInt, [](int64_t) { return 1; })), "");
  });
}

TEST_P(ProcessGroupTest, AllReduceLeavesTheSumMaxOrMinOnEveryRank) {
  run_all([](ProcessGroup& group, at::ScalarType dtype, int64_t numel) {
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      at::Tensor x = made(numel, dtype, [&](int64_t i) { return term(group.rank(), i); });
      group.all_reduce(x, op).wait();
      EXPECT_EQ(difference(x, made(numel, dtype, [&](int64_t i) { return reduced(group.size(), op, i); })), "")
          << "operation " << static_cast<int>(op);
    }
  });
}

TEST_P(ProcessGroupTest, AllReduceKeepsShapesAndNegativeNumbers) {
  run([](ProcessGroup& group) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kLong}) {
      at::Tensor x = at::full({3, 5}, -1 - group.rank(), dtype);
      group.all_reduce(x, ReduceOp::kMax).wait();
      EXPECT_EQ(difference(x, at::full({3, 5}, -1, dtype)), "");
      EXPECT_EQ(x.sizes(), (at::IntArrayRef{3, 5}));
      group.all_reduce(x).wait();
      EXPECT_EQ(difference(x, at::full({3, 5}, -group.size(), dtype)), "");
    }
  });
}

TEST_P(ProcessGroupTest, ReduceScatterGivesEachRankItsPieceOfTheReduction) {
  run_all([](ProcessGroup& group, at::ScalarType dtype, int64_t numel) {
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kMin}) {
      const auto before = [&](int64_t i) { return term(group.rank(), i); };
      const at::Tensor input = made(numel * group.size(), dtype, before);
      at::Tensor piece = at::empty({numel}, input.options());
      group.reduce_scatter(piece, input, op).wait();
      const int64_t begin = group.rank() * numel;
      EXPECT_EQ(difference(piece, made(numel, dtype, [&](int64_t i) { return reduced(group.size(), op, begin + i); })),
                "")
          << "operation " << static_cast<int>(op);
      EXPECT_EQ(difference(input, made(input.numel(), dtype, before)), "") << "the input is only read";
    }
  });
}

TEST_P(ProcessGroupTest, AllGatherConcatenatesInRankOrderAndInPlace) {
  run_all([](ProcessGroup& group, at::ScalarType dtype, int64_t numel) {
    const at::Tensor wanted = made(numel * group.size(), dtype, [&](int64_t i) {
      return brought(static_cast<int>(i / std::max<int64_t>(numel, 1)), i % std::max<int64_t>(numel, 1));
    });
    const at::Tensor mine = made(numel, dtype, [&](int64_t i) { return brought(group.rank(), i); });
    at::Tensor all = at::full({numel * group.size()}, 3, mine.options());
    group.all_gather(all, mine).wait();
    EXPECT_EQ(difference(all, wanted), "");
    all.fill_(3);
    const at::Tensor own = all.narrow(0, group.rank() * numel, numel);
    own.copy_(mine);
    group.all_gather(all, own).wait();
    EXPECT_EQ(difference(all, wanted), "") << "in place";
  });
}

TEST_P(ProcessGroupTest, UnevenAllGatherTakesAnyCountsAlsoNone) {
  run_all([](ProcessGroup& group, at::ScalarType dtype, int64_t numel) {
    const std::function<int64_t(int)> patterns[] = {
        [&](int rank) { return (numel + rank) % 3 == 0 ? 0 : numel + rank; },  // gaps
        [&](int rank) { return rank == group.size() - 1 ? numel : 0; },        // one has it all
        [&](int rank) { return std::max<int64_t>(0, std::min<int64_t>(4, numel - int64_t{4} * rank)); },  // cut every 4
    };
    for (const auto& count : patterns) {
      std::vector<int64_t> counts, wanted;
      for (int rank = 0; rank < group.size(); ++rank) {
        counts.push_back(count(rank));
        for (int64_t i = 0; i < counts.back(); ++i) wanted.push_back(brought(rank, i));
      }
      const auto total = static_cast<int64_t>(wanted.size());
      int64_t offset = 0;
      for (int rank = 0; rank < group.rank(); ++rank) offset += counts[rank];
      for (const bool in_place : {false, true}) {
        at::Tensor all = at::full({total}, 3, dtype);
        at::Tensor mine = made(counts[group.rank()], dtype, [&](int64_t i) { return brought(group.rank(), i); });
        if (in_place) mine = all.narrow(0, offset, mine.numel()).copy_(mine);
        group.all_gather_uneven(all, mine, counts).wait();
        EXPECT_EQ(difference(all, made(total, dtype, [&](int64_t i) { return wanted[i]; })), "")
            << (in_place ? "in place" : "");
      }
    }
  });
}

TEST_P(ProcessGroupTest, AllToAllBringsEachRankWhatTheOthersHaveForIt) {
  run_all([](ProcessGroup& group, at::ScalarType dtype, int64_t numel) {
    const int me = group.rank();
    const auto count = [&](int from, int to) { return (from * 2 + to * 3) % 4 == 0 ? 0 : numel / (1 + (from ^ to)); };
    const auto letter = [](int from, int to, int64_t i) { return brought(from * 8 + to, i); };
    std::vector<int64_t> send_counts, receive_counts, sent, wanted;
    for (int other = 0; other < group.size(); ++other) {
      send_counts.push_back(count(me, other));
      receive_counts.push_back(count(other, me));
      for (int64_t i = 0; i < send_counts.back(); ++i) sent.push_back(letter(me, other, i));
      for (int64_t i = 0; i < receive_counts.back(); ++i) wanted.push_back(letter(other, me, i));
    }
    const at::Tensor input = made(static_cast<int64_t>(sent.size()), dtype, [&](int64_t i) { return sent[i]; });
    at::Tensor output = at::full({static_cast<int64_t>(wanted.size())}, 3, dtype);
    group.all_to_all(output, input, receive_counts, send_counts).wait();
    EXPECT_EQ(difference(output, made(output.numel(), dtype, [&](int64_t i) { return wanted[i]; })), "");
  });
}

TEST_P(ProcessGroupTest, BroadcastTakesEveryRootAtItsWord) {
  run_all([](ProcessGroup& group, at::ScalarType dtype, int64_t numel) {
    for (int root = 0; root < group.size(); ++root) {
      at::Tensor x = made(numel, dtype, [&](int64_t i) { return brought(group.rank(), i); });
      group.broadcast(x, root).wait();
      EXPECT_EQ(difference(x, made(numel, dtype, [&](int64_t i) { return brought(root, i); })), "") << "root " << root;
    }
  });
}

TEST_P(ProcessGroupTest, LettersFindTheirRankAndTagInAnyOrder) {
  if (GetParam().is_one_queue) return;
  run_all([](ProcessGroup& group, at::ScalarType dtype, int64_t numel) {
    const int me = group.rank(), size = group.size();
    const auto letter = [&](int from, int to, int tag) {
      return made(numel, dtype, [&](int64_t i) { return brought(from * 8 + to, i + tag); });
    };
    std::vector<Work> sends;
    for (int to = 0; to < size; ++to) {
      if (to == me) continue;
      for (const int tag : {0, 5, 1023}) sends.push_back(group.send(letter(me, to, tag), to, tag));
    }
    for (int from = size - 1; from >= 0; --from) {
      if (from == me) continue;
      for (const int tag : {1023, 0, 5}) {
        at::Tensor x = at::full({numel}, 3, dtype);
        group.recv(x, from, tag).wait();
        EXPECT_EQ(difference(x, letter(from, me, tag)), "") << "from " << from << " tag " << tag;
      }
    }
    for (Work& work : sends) work.wait();
  });
}

TEST_P(ProcessGroupTest, LettersOfOneTagArriveInTheOrderSent) {
  run([](ProcessGroup& group) {
    const int next = (group.rank() + 1) % group.size(), before = (group.rank() + group.size() - 1) % group.size();
    if (next == group.rank()) return;
    std::vector<Work> sends;
    sends.reserve(20);
    for (int i = 0; i < 20; ++i) sends.push_back(group.send(at::full({7}, i, at::kInt), next, 3));
    std::vector<Work> receives;
    std::vector<at::Tensor> received;
    for (int i = 0; i < 20; ++i) {
      received.push_back(at::zeros({7}, at::kInt));
      receives.push_back(group.recv(received[i], before, 3));
      if (!GetParam().is_one_queue) receives[i].wait();
    }
    for (int i = 0; i < 20; ++i) {
      receives[i].wait();
      EXPECT_EQ(difference(received[i], at::full({7}, i, at::kInt)), "");
    }
    for (Work& work : sends) work.wait();
  });
}

TEST_P(ProcessGroupTest, ManyAreInFlightAndEachIsWaitedForTwiceInAnyOrder) {
  run([](ProcessGroup& group) {
    const int size = group.size(), me = group.rank();
    const int64_t n = GetParam().many();
    std::vector<at::Tensor> results, wanted;
    std::vector<Work> works;
    for (int round = 0; round < 3; ++round) {
      const auto mine = [&](int64_t i) { return term(me + round, i); };
      results.push_back(made(n, at::kFloat, mine));
      works.push_back(group.all_reduce(results.back()));
      wanted.push_back(made(n, at::kFloat, [&](int64_t i) {
        int64_t sum = 0;
        for (int rank = 0; rank < size; ++rank) sum += term(rank + round, i);
        return sum;
      }));
      results.push_back(at::empty({n * size}, at::kFloat));
      works.push_back(group.all_gather(results.back(), made(n, at::kFloat, mine)));  // the Work keeps its input alive
      wanted.push_back(
          made(n * size, at::kFloat, [&](int64_t i) { return term(static_cast<int>(i / n) + round, i % n); }));
      results.push_back(made(n, at::kFloat, mine));
      works.push_back(group.broadcast(results.back(), round % size));
      wanted.push_back(made(n, at::kFloat, [&](int64_t i) { return term(round % size + round, i); }));
    }
    for (size_t i = works.size(); i-- > 0;) {
      while (!works[i].poll()) std::this_thread::yield();
      EXPECT_TRUE(works[i].poll());
      works[i].wait();
      works[i].wait();
      EXPECT_EQ(difference(results[i], wanted[i]), "") << "operation " << i;
    }
  });
}

TEST_P(ProcessGroupTest, NothingToDoIsDone) {
  Work none;
  EXPECT_TRUE(none.poll());
  none.wait();
}

TEST_P(ProcessGroupTest, PollDoesNotWaitForAPeer) {
  run([](ProcessGroup& group) {
    if (group.size() == 1 || GetParam().is_one_queue) return;  // there what is sent comes after the reduction
    at::Tensor x = at::full({3}, 1, at::kFloat), gate = at::zeros({1}, at::kFloat);
    if (group.rank() == 0) {
      group.recv(gate, 1).wait();  // rank 1 has polled by now
      group.all_reduce(x).wait();
    } else if (GetParam().is_checked && std::string(group.backend()) == "mpi") {
      if (group.rank() == 1) group.send(gate, 0).wait();  // comparing the calls waits for all ranks by its nature
      group.all_reduce(x).wait();
    } else {
      Work work = group.all_reduce(x);
      for (int i = 0; i < 10; ++i) {
        if (group.rank() == 1) {
          EXPECT_FALSE(work.poll()) << "rank 0 has not come";
        }
      }
      if (group.rank() == 1) group.send(gate, 0).wait();
      work.wait();
    }
    EXPECT_EQ(difference(x, at::full({3}, group.size(), at::kFloat)), "");
  });
}

TEST_P(ProcessGroupTest, NobodyLeavesABarrierBeforeTheLastHasCome) {
  run([](ProcessGroup& group) {
    for (int late = 0; late < group.size(); ++late) {
      if (group.rank() == late) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      const auto now = [] { return steady_clock::now().time_since_epoch().count(); };  // one clock for the whole host
      const int64_t came = now();
      group.barrier();
      const int64_t left = now();
      const std::string all = all_gather_bytes(group, std::as_bytes(std::span(&came, 1)));
      for (int rank = 0; rank < group.size(); ++rank) {
        int64_t theirs = 0;
        std::memcpy(&theirs, all.data() + rank * sizeof(theirs), sizeof(theirs));
        EXPECT_LE(theirs, left) << "rank " << group.rank() << " left before rank " << rank << " came";
      }
    }
  });
}

TEST_P(ProcessGroupTest, PartsOfAGroupWaitForControlDataAsLongAsItDoes) {
  run([](ProcessGroup& group) {
    group.set_control_timeout(Milliseconds(123'456));
    const auto part = group.split(group.rank() % 2, group.rank(), "half"), all = part->split(0, part->rank(), "all");
    EXPECT_EQ(part->control_timeout(), Milliseconds(123'456));
    EXPECT_EQ(all->control_timeout(), Milliseconds(123'456));
    all->close();
    part->close();
  });
}

TEST_P(ProcessGroupTest, AllGatherBytesKeepsEveryByteAndRankOrder) {
  run([](ProcessGroup& group) {
    for (const size_t size : {0, 1, 5, 300}) {
      std::string mine, wanted;
      for (int rank = 0; rank < group.size(); ++rank) {
        for (size_t i = 0; i < size; ++i) {
          wanted.push_back(static_cast<char>(size_t{50} * rank + i));
          if (rank == group.rank()) mine.push_back(wanted.back());
        }
      }
      EXPECT_EQ(all_gather_bytes(group, std::as_bytes(std::span(mine))), wanted) << size << " bytes";
    }
  });
}

TEST_P(ProcessGroupTest, WhatIsShownIsReadByAllWhereTheBackEndCanAndByNoneElse) {
  run([](ProcessGroup& group) {
    const int me = group.rank(), size = group.size();
    const auto numel = [](int rank, int64_t i) { return (rank + i) % 3 == 0 ? 0 : 100 * i + rank; };
    std::vector<std::unique_ptr<Shown>> under_way;
    std::vector<std::vector<at::Tensor>> brought_by_me(3);
    for (int round = 0; round < 3; ++round) {
      for (int64_t i = 0; i <= me % 3; ++i) {  // other numbers of tensors on each rank, mapped ones and not
        at::Tensor x = group.empty_mapped(numel(me, i), at::TensorOptions(at::kFloat));
        EXPECT_EQ(x.numel(), numel(me, i));
        if (round == 1) x = at::empty({numel(me, i)}, at::kFloat);
        brought_by_me[round].push_back(
            x.copy_(made(x.numel(), at::kFloat, [&](int64_t j) { return brought(me, round + j); })));
      }
      under_way.push_back(group.show(brought_by_me[round]));
    }
    for (int round = 2; round >= 0; --round) {
      auto shown = std::move(under_way[round]);
      EXPECT_EQ(shown != nullptr, std::string(group.backend()) == "shm");
      if (!shown) continue;
      while (!shown->poll()) std::this_thread::yield();
      shown->wait();
      for (int rank = 0; rank < size; ++rank) {
        for (int64_t i = 0; i <= rank % 3; ++i) {
          const auto* data = static_cast<const float*>(shown->data(rank, i));
          int64_t wrong = 0;
          for (int64_t j = 0; j < numel(rank, i); ++j) wrong += data[j] != static_cast<float>(brought(rank, round + j));
          EXPECT_EQ(wrong, 0) << "tensor " << i << " of rank " << rank << " in round " << round;
        }
      }
      shown->done();
      for (at::Tensor& x : brought_by_me[round]) x.fill_(-1);  // all have read it
    }
  });
}

TEST_P(ProcessGroupTest, SplitMakesGroupsByColorOrderedByKeyThenRank) {
  run([](ProcessGroup& group) {
    const int me = group.rank(), size = group.size(), color = me % 3;
    const auto reversed = group.split(color, -me, "reversed");
    const auto by_rank = group.split(color, 7, "by rank");  // equal keys
    std::vector<int64_t> members;
    for (int rank = 0; rank < size; ++rank) {
      if (rank % 3 == color) members.push_back(rank);
    }
    const auto n = static_cast<int64_t>(members.size());
    EXPECT_EQ(by_rank->size(), n);
    EXPECT_EQ(by_rank->name(), "by rank");
    if (group.backend() != std::string("two_level")) {  // a part of it may lie on one node, or hold one rank of each
      EXPECT_STREQ(by_rank->backend(), group.backend());
    }
    at::Tensor all = at::empty({n}, at::kLong);
    by_rank->all_gather(all, at::full({1}, me, at::kLong)).wait();
    EXPECT_EQ(difference(all, made(n, at::kLong, [&](int64_t i) { return members[i]; })), "");
    reversed->all_gather(all, at::full({1}, me, at::kLong)).wait();
    EXPECT_EQ(difference(all, made(n, at::kLong, [&](int64_t i) { return members[n - 1 - i]; })), "");
    reversed->close();
    by_rank->close();
  });
}

TEST_P(ProcessGroupTest, ChildrenGrandchildrenAndParentWorkSideBySide) {
  run([](ProcessGroup& group) {
    const int me = group.rank(), size = group.size();
    const auto half = group.split(me < (size + 1) / 2 ? 0 : 1, me, "half");
    const auto alone = half->split(half->rank(), 0, "alone");
    EXPECT_EQ(alone->size(), 1);
    at::Tensor in_world = at::full({5}, 1, at::kInt), in_half = in_world.clone(), in_alone = in_world.clone();
    Work a = half->all_reduce(in_half), b = group.all_reduce(in_world), c = alone->all_reduce(in_alone);
    c.wait();
    b.wait();
    a.wait();
    EXPECT_EQ(difference(in_half, at::full({5}, half->size(), at::kInt)), "");
    EXPECT_EQ(difference(in_world, at::full({5}, size, at::kInt)), "");
    EXPECT_EQ(difference(in_alone, at::full({5}, 1, at::kInt)), "");
    alone->close();
    half->close();
    at::Tensor after = at::full({1}, 2, at::kFloat);
    group.all_reduce(after).wait();
    EXPECT_EQ(difference(after, at::full({1}, 2 * size, at::kFloat)), "") << "the parent outlives its children";
  });
}

// Every operation, with rank 0 staying away. Each has a group of its own: after the error it is unusable.
TEST_P(ProcessGroupTest, OneThatStaysAwayIsATimeoutThatNamesOperationAndGroup) {
  struct Case {
    const char* operation;
    std::function<void(ProcessGroup&)> call;
  };
  const auto vector = [](int64_t numel) { return at::full({numel}, 1, at::kFloat); };
  const Case cases[] = {
      {"all_reduce", [&](ProcessGroup& g) { g.all_reduce(vector(5), ReduceOp::kSum, kSoon).wait(); }},
      {"reduce_scatter",
       [&](ProcessGroup& g) {
         g.reduce_scatter(vector(5), vector(int64_t{5} * g.size()), ReduceOp::kSum, kSoon).wait();
       }},
      {"all_gather", [&](ProcessGroup& g) { g.all_gather(vector(int64_t{5} * g.size()), vector(5), kSoon).wait(); }},
      {"all_to_all",
       [&](ProcessGroup& g) {
         const std::vector<int64_t> counts(g.size(), 2);
         g.all_to_all(vector(int64_t{2} * g.size()), vector(int64_t{2} * g.size()), counts, counts, kSoon).wait();
       }},
      {"broadcast", [&](ProcessGroup& g) { g.broadcast(vector(5), 0, kSoon).wait(); }},
      {"recv", [&](ProcessGroup& g) { g.recv(vector(5), 0, 1, kSoon).wait(); }},
      {"barrier", [&](ProcessGroup& g) { g.barrier(kSoon); }},
      {"all_gather",
       [&](ProcessGroup& g) {
         g.set_control_timeout(kSoon);
         all_gather_text(g, "some text");
       }},
      {"show", [&](ProcessGroup& g) { g.show({vector(5)}, kSoon)->wait(); }},
  };
  run([&](ProcessGroup& group) {
    if (group.size() == 1) return;  // nobody to wait for
    for (const Case& attempt : cases) {
      if (attempt.operation == std::string("show") && group.backend() != std::string("shm")) continue;
      const auto waiting = group.split(0, group.rank(), "those who wait");
      if (group.rank() > 0) {
        const auto start = steady_clock::now();
        const std::string message = message_of([&] { attempt.call(*waiting); });
        const auto took = steady_clock::now() - start;
        EXPECT_THAT(message, HasSubstr(attempt.operation));
        EXPECT_THAT(message, HasSubstr("those who wait"));
        EXPECT_THAT(message,
                    HasSubstr("[rank " + std::to_string(group.rank()) + "/" + std::to_string(group.size()) + "]"));
        EXPECT_GE(took, kSoon);
        EXPECT_LT(took, std::chrono::seconds(10)) << attempt.operation;
        const auto again = steady_clock::now();
        EXPECT_THAT(message_of([&] { waiting->barrier(); }), HasSubstr("unusable")) << "after " << attempt.operation;
        EXPECT_LT(steady_clock::now() - again, std::chrono::seconds(10));
      }
      group.barrier();
      waiting->abort();  // rank 0 never called, so an orderly end is not to be had
      waiting->close();
    }
  });
}

TEST_P(ProcessGroupTest, AbortFromAnotherThreadEndsAWait) {
  run([](ProcessGroup& group) {
    if (group.size() == 1) return;
    const auto part = group.split(0, group.rank(), "part");
    if (group.rank() > 0) {
      std::thread other([&] {
        std::this_thread::sleep_for(kSoon);
        part->abort();
      });
      const auto start = steady_clock::now();
      const std::string message =
          message_of([&] { part->all_reduce(at::full({5}, 1, at::kFloat)).wait(); });  // rank 0 stays away
      other.join();
      EXPECT_THAT(message, testing::AllOf(HasSubstr("all_reduce"), HasSubstr("part"), HasSubstr("aborted")));
      EXPECT_LT(steady_clock::now() - start, std::chrono::seconds(10));
      EXPECT_THAT(message_of([&] { part->barrier(); }), HasSubstr("unusable"));
      EXPECT_NE(message_of([&] { part->split(0, 0, "too late"); }), "no CollectiveError");
    }
    group.barrier();
    part->abort();
    part->close();
    at::Tensor x = at::full({1}, 1, at::kFloat);
    group.all_reduce(x).wait();
    EXPECT_EQ(difference(x, at::full({1}, group.size(), at::kFloat)), "") << "the parent is untouched";
  });
}

TEST_P(ProcessGroupTest, CallsThatDifferNameTwoRanksWhereTheyAreCompared) {
  if (!GetParam().is_checked) return;
  struct Case {
    std::string theirs, ours;  // in the message: what rank 0 calls, what the others call
    std::function<void(ProcessGroup&, bool is_first)> call;
  };
  const auto filled = [](int64_t numel, at::ScalarType dtype) { return at::full({numel}, 1, dtype); };
  const Case cases[] = {
      {"broadcast", "all_reduce",
       [&](ProcessGroup& g, bool is_first) {
         (is_first ? g.broadcast(filled(5, at::kFloat), 0) : g.all_reduce(filled(5, at::kFloat))).wait();
       }},
      {"Double", "Float",
       [&](ProcessGroup& g, bool is_first) { g.all_reduce(filled(5, is_first ? at::kDouble : at::kFloat)).wait(); }},
      {"of 6", "of 5",
       [&](ProcessGroup& g, bool is_first) { g.all_reduce(filled(is_first ? 6 : 5, at::kFloat)).wait(); }},
      {"(max)", "(sum)",
       [&](ProcessGroup& g, bool is_first) {
         g.all_reduce(filled(5, at::kFloat), is_first ? ReduceOp::kMax : ReduceOp::kSum).wait();
       }},
      {"from 0", "from 1",
       [&](ProcessGroup& g, bool is_first) { g.broadcast(filled(5, at::kFloat), is_first ? 0 : 1).wait(); }},
  };
  run([&](ProcessGroup& group) {
    if (group.size() == 1) return;
    for (const Case& mismatch : cases) {
      const auto part = group.split(0, group.rank(), "part");
      std::string message = "no ShapeMismatch";
      try {
        mismatch.call(*part, group.rank() == 0);
      } catch (const ShapeMismatch& error) {
        message = error.what();
      }
      EXPECT_THAT(message, testing::AllOf(HasSubstr("part"), HasSubstr(mismatch.theirs), HasSubstr(mismatch.ours)));
      EXPECT_THAT(message, HasSubstr("rank " + std::to_string(group.rank()) + " calls"));
      EXPECT_THAT(message, HasSubstr("while rank " + std::to_string(group.rank() == 0 ? 1 : 0) + " calls"));
      group.barrier();
      part->abort();
      part->close();
    }
  });
}

TEST_P(ProcessGroupTest, SizesAndDtypesThatDoNotFitAreRefusedBeforeAnythingIsSent) {
  run([](ProcessGroup& group) {
    const int64_t p = group.size();
    const auto vector = [](int64_t numel) { return at::full({numel}, 1, at::kFloat); };
    const std::vector<int64_t> twos(p, 2);
    EXPECT_THROW(group.reduce_scatter(vector(3), vector(3 * p + 1)), CheckFailed);
    EXPECT_THROW(group.all_gather(vector(3 * p + 1), vector(3)), CheckFailed);
    EXPECT_THROW(group.all_gather_uneven(vector(2 * p), vector(3), twos), CheckFailed);
    EXPECT_THROW(group.all_to_all(vector(2 * p + 1), vector(2 * p), twos, twos), CheckFailed);
    const auto wide = [](int64_t numel) { return at::full({numel}, 1, at::kDouble); };
    EXPECT_THROW(group.reduce_scatter(vector(3), wide(3 * p)), CheckFailed);
    EXPECT_THROW(group.all_gather(vector(3 * p), wide(3)), CheckFailed);
    EXPECT_THROW(group.all_gather_uneven(vector(2 * p), wide(2), twos), CheckFailed);
    EXPECT_THROW(group.all_to_all(vector(2 * p), wide(2 * p), twos, twos), CheckFailed);
  });
}

TEST_P(ProcessGroupTest, RanksComputeAlikeAndSaySo) {
  run([](ProcessGroup& group) {
    const std::string record = arithmetic_record(3);
    EXPECT_THAT(record, testing::AllOf(HasSubstr("torch 2."), HasSubstr("threads 3")));
    const std::string all = all_gather_bytes(group, std::as_bytes(std::span(record)));
    for (int rank = 0; rank < group.size(); ++rank) {
      EXPECT_EQ(all.substr(rank * record.size(), record.size()), record);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Worlds, ProcessGroupTest, testing::ValuesIn(worlds()), testing::PrintToStringParamName());

}  // namespace
}  // namespace lockstep
