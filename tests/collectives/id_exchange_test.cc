#include "id_exchange.h"

#include <array>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {
namespace {

using testing::HasSubstr;
using namespace std::chrono_literals;

using Milliseconds = std::chrono::milliseconds;
using Id = std::array<std::byte, 128>;

Id id_of_rank(int rank) {
  Id id{};
  for (size_t i = 0; i < id.size(); ++i) id[i] = static_cast<std::byte>(i * 7 + static_cast<size_t>(rank) + 1);
  return id;
}

UniqueFd listen_on_loopback(int* port) {
  UniqueFd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  EXPECT_EQ(bind(socket.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(socket.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  EXPECT_EQ(listen(socket.get(), 8), 0);
  *port = ntohs(address.sin_port);
  return socket;
}

UniqueFd call(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  for (int attempt = 0; attempt < 500; ++attempt) {
    UniqueFd socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return socket;
    std::this_thread::sleep_for(10ms);
  }
  ADD_FAILURE() << "nobody listens at port " << port;
  return UniqueFd();
}

class IdExchangeTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = testing::TempDir() + "id_exchange.XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  MeetingPlace by_file() const { return {.file = folder_ + "/id", .job = "42/0"}; }
  MeetingPlace by_tcp() const {
    int port = 0;
    listen_on_loopback(&port);  // closed again at once: a port that was free a moment ago
    return {.host = "127.0.0.1", .port = port, .job = "42/0"};
  }

  // Runs the exchange on threads; what a rank threw, by rank.
  static std::map<int, std::string> meet(const MeetingPlace& place, int world_size, std::vector<Id>& ids,
                                         Milliseconds timeout = 20s, std::vector<int> ranks = {}) {
    if (ranks.empty()) {
      ranks.resize(static_cast<size_t>(world_size));
      std::iota(ranks.begin(), ranks.end(), 0);
    }
    ids.assign(static_cast<size_t>(world_size), {});
    std::map<int, std::string> failures;
    std::mutex mutex;
    std::vector<std::thread> threads;
    threads.reserve(ranks.size());
    for (const int rank : ranks) {
      threads.emplace_back([&, rank] {
        ids[rank] = id_of_rank(rank);
        try {
          exchange_id(place, rank, world_size, ids[rank], timeout);
        } catch (const Error& error) {
          const std::lock_guard lock(mutex);
          failures[rank] = error.what();
        }
      });
    }
    for (auto& thread : threads) thread.join();
    return failures;
  }

  std::string folder_;
};

class IdExchangeWorldTest : public IdExchangeTest, public testing::WithParamInterface<std::tuple<int, bool>> {};

TEST_P(IdExchangeWorldTest, EveryRankHoldsTheIdOfRankZeroAndNothingIsLeftBehind) {
  const auto [world_size, is_file] = GetParam();
  std::vector<Id> ids;
  EXPECT_THAT(meet(is_file ? by_file() : by_tcp(), world_size, ids), testing::IsEmpty());
  for (int rank = 0; rank < world_size; ++rank) EXPECT_EQ(ids[rank], id_of_rank(0)) << "rank " << rank;
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}
INSTANTIATE_TEST_SUITE_P(Worlds, IdExchangeWorldTest, testing::Combine(testing::Values(1, 2, 3, 7), testing::Bool()),
                         [](const auto& info) {
                           return std::string(std::get<1>(info.param) ? "File" : "Tcp") +
                                  std::to_string(std::get<0>(info.param));
                         });

TEST_F(IdExchangeTest, ProcessesMeetTooWhenRankZeroComesLast) {
  const MeetingPlace place = by_tcp();
  std::vector<pid_t> children;
  for (int rank = 1; rank < 4; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      Id id = id_of_rank(rank);
      try {
        exchange_id(place, rank, 4, id, 20s);
      } catch (...) {
        _exit(1);
      }
      _exit(id == id_of_rank(0) ? 0 : 2);
    }
    children.push_back(child);
  }
  std::this_thread::sleep_for(100ms);
  Id id = id_of_rank(0);
  EXPECT_NO_THROW(exchange_id(place, 0, 4, id, 20s));
  for (const pid_t child : children) {
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  }
}

TEST_F(IdExchangeTest, RankZeroNamesTheRanksThatDidNotCome) {
  for (const MeetingPlace& place : {by_file(), by_tcp()}) {
    std::vector<Id> ids;
    const auto failures = meet(place, 4, ids, 300ms, {0, 2});
    ASSERT_EQ(failures.size(), 1U) << place.describe();
    EXPECT_THAT(failures.at(0), HasSubstr("timed out after 300 ms: rank 1, 3 did not come")) << place.describe();
    EXPECT_EQ(ids[2], id_of_rank(0));
  }
}

TEST_F(IdExchangeTest, ARankWithoutARankZeroTimesOutAndTakesItsRequestBack) {
  for (const MeetingPlace& place : {by_file(), by_tcp()}) {
    std::vector<Id> ids;
    const auto failures = meet(place, 2, ids, 200ms, {1});
    ASSERT_EQ(failures.size(), 1U) << place.describe();
    EXPECT_THAT(failures.at(1), testing::AllOf(HasSubstr("[rank 1/2]"), HasSubstr(place.describe()),
                                               HasSubstr("timed out after 200 ms")));
    EXPECT_TRUE(std::filesystem::is_empty(folder_));
  }
}

TEST_F(IdExchangeTest, AnotherProgramAtThePortIsAConfigurationMistake) {
  int port = 0;
  const UniqueFd listener = listen_on_loopback(&port);
  std::thread program([&] {
    const UniqueFd caller(accept(listener.get(), nullptr, nullptr));
    const std::string page = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    EXPECT_EQ(send(caller.get(), page.data(), page.size(), MSG_NOSIGNAL), static_cast<ssize_t>(page.size()));
    char rest[64];
    while (recv(caller.get(), rest, sizeof(rest), 0) > 0) {
    }
  });
  Id id = id_of_rank(1);
  EXPECT_THROW(exchange_id({.host = "127.0.0.1", .port = port, .job = "42/0"}, 1, 2, id, 20s), ConfigError);
  EXPECT_EQ(id, id_of_rank(1));
  program.join();
}

TEST_F(IdExchangeTest, StrangersAndSilentConnectionsDoNotDelayTheRanks) {
  const MeetingPlace place = by_tcp();
  std::thread rank_zero([&] {
    Id id = id_of_rank(0);
    EXPECT_NO_THROW(exchange_id(place, 0, 3, id, 20s));
  });
  std::vector<UniqueFd> silent;
  silent.reserve(64);
  for (int i = 0; i < 64; ++i) silent.push_back(call(place.port));
  const UniqueFd stranger = call(place.port);
  const std::string noise(512, 'x');
  EXPECT_EQ(send(stranger.get(), noise.data(), noise.size(), MSG_NOSIGNAL), static_cast<ssize_t>(noise.size()));
  const auto start = std::chrono::steady_clock::now();
  std::vector<Id> ids;
  EXPECT_THAT(meet(place, 3, ids, 20s, {1, 2}), testing::IsEmpty());
  EXPECT_LT(std::chrono::steady_clock::now() - start, 1500ms);  // sooner than the silent ones are given up
  EXPECT_EQ(ids[1], id_of_rank(0));
  char byte = 0;
  EXPECT_LE(recv(stranger.get(), &byte, 1, 0), 0) << "a stranger was answered";
  rank_zero.join();
}

TEST_F(IdExchangeTest, ARankOfAnotherJobIsTurnedAway) {
  const MeetingPlace place = by_tcp();
  MeetingPlace other = place;
  other.job = "42/1";  // the start after
  std::thread rank_zero([&] {
    Id id = id_of_rank(0);
    EXPECT_NO_THROW(exchange_id(place, 0, 2, id, 20s));
  });
  Id theirs = id_of_rank(1), ours = id_of_rank(1);
  EXPECT_THROW(exchange_id(other, 1, 2, theirs, 200ms), CollectiveError);
  EXPECT_EQ(theirs, id_of_rank(1));
  EXPECT_NO_THROW(exchange_id(place, 1, 2, ours, 20s));
  EXPECT_EQ(ours, id_of_rank(0));
  rank_zero.join();
}

TEST_F(IdExchangeTest, RanksThatDisagreeOnTheWorldAreToldBothSides) {
  for (const MeetingPlace& place : {by_file(), by_tcp()}) {
    std::thread rank_zero([&, place] {
      Id id = id_of_rank(0);
      EXPECT_THROW(exchange_id(place, 0, 2, id, 400ms), CollectiveError);
    });
    Id id = id_of_rank(1);
    try {
      exchange_id(place, 1, 3, id, 20s);
      ADD_FAILURE() << "no error " << place.describe();
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr("rank 0 has world_size 2 and an id of 128 bytes, this rank 3 and 128"));
    }
    rank_zero.join();
  }
}

// A rank that was killed after it asked: its request stays.
void leave_request_of_rank_one(const MeetingPlace& place) {
  const std::string request = place.file + ".1";
  std::thread killed([&] {
    Id id{};
    EXPECT_THROW(exchange_id(place, 1, 2, id, 300ms), CollectiveError);
  });
  while (!std::filesystem::exists(request)) std::this_thread::sleep_for(1ms);
  std::filesystem::copy_file(request, place.file + ".kept");
  killed.join();
  std::filesystem::rename(place.file + ".kept", request);  // as if killed instead of timed out
}

TEST_F(IdExchangeTest, TheAnswerOfAnEarlierStartIsNotTaken) {
  const MeetingPlace place = by_file();
  leave_request_of_rank_one(place);
  Id earlier = id_of_rank(5);
  EXPECT_THROW(exchange_id(place, 0, 2, earlier, 100ms), CollectiveError);
  ASSERT_TRUE(std::filesystem::exists(place.file + ".1.answer"));
  std::vector<Id> ids;
  std::thread rank_one([&] { EXPECT_THAT(meet(place, 2, ids, 5s, {1}), testing::IsEmpty()); });
  std::this_thread::sleep_for(50ms);  // with the old answer before its eyes
  Id id = id_of_rank(0);
  EXPECT_NO_THROW(exchange_id(place, 0, 2, id, 5s));
  rank_one.join();
  EXPECT_EQ(ids[1], id_of_rank(0));
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(IdExchangeTest, ARankIsAnsweredAlthoughItsDeadPredecessorWasBefore) {
  const MeetingPlace place = by_file();
  leave_request_of_rank_one(place);
  std::thread rank_zero([&] {
    Id id = id_of_rank(0);
    EXPECT_NO_THROW(exchange_id(place, 0, 2, id, 5s));
  });
  while (!std::filesystem::exists(place.file + ".1.answer")) std::this_thread::sleep_for(1ms);
  Id id = id_of_rank(1);
  EXPECT_NO_THROW(exchange_id(place, 1, 2, id, 5s));
  EXPECT_EQ(id, id_of_rank(0));
  rank_zero.join();
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(IdExchangeTest, ALinkInTheSharedFolderIsNotFollowed) {
  const MeetingPlace place = by_file();
  std::ofstream(folder_ + "/precious") << "keep";
  std::filesystem::create_symlink(folder_ + "/precious", place.file + ".1.new");
  std::filesystem::create_symlink(folder_ + "/precious", place.file + ".1.answer.new");
  std::vector<Id> ids;
  EXPECT_THAT(meet(place, 2, ids), testing::IsEmpty());
  std::string text;
  std::ifstream(folder_ + "/precious") >> text;
  EXPECT_EQ(text, "keep");
}

Environment environment_of(const std::map<std::string, std::string>& variables) {
  return [variables](const char* name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  };
}

TEST(MeetingPlaceTest, IsReadFromTheEnvironment) {
  const auto tcp = meeting_place(environment_of({{"MASTER_ADDR", "node1"}, {"MASTER_PORT", "29500"}}));
  EXPECT_EQ(tcp.describe(), "at node1:29500");
  const auto file = meeting_place(
      environment_of({{"LOCKSTEP_ID_FILE", "/shared/id"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "29500"}}));
  EXPECT_EQ(file.describe(), "in file /shared/id");
}

TEST(MeetingPlaceTest, LeavesTorchrunsOwnStoreItsPort) {
  const auto place = meeting_place(
      environment_of({{"MASTER_ADDR", "node1"}, {"MASTER_PORT", "29500"}, {"TORCHELASTIC_USE_AGENT_STORE", "True"}}));
  EXPECT_EQ(place.port, 29501);
}

TEST(MeetingPlaceTest, TellsStartsOfOneJobApart) {
  const auto start = [](const char* count) {
    return meeting_place(environment_of({{"MASTER_ADDR", "node1"},
                                         {"MASTER_PORT", "29500"},
                                         {"TORCHELASTIC_RUN_ID", "run"},
                                         {"TORCHELASTIC_RESTART_COUNT", count}}))
        .job;
  };
  EXPECT_NE(start("0"), start("1"));
  EXPECT_EQ(start("1"), start("1"));
}

TEST(MeetingPlaceTest, SaysWhatToSetWhenThereIsNone) {
  EXPECT_THROW(meeting_place(environment_of({{"MASTER_ADDR", "node1"}})), ConfigError);
  for (const char* port : {"0", "65535", "70000", "-1", "80x", ""}) {
    EXPECT_THROW(meeting_place(environment_of({{"MASTER_ADDR", "node1"}, {"MASTER_PORT", port}})), ConfigError) << port;
  }
}

}  // namespace
}  // namespace lockstep
