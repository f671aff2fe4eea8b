// The supervisor's port over real sockets, and the agents' link to it: strangers cannot get in, nor keep agents out.
#include "../../launcher/src/agent_server.h"

#include <filesystem>
#include <thread>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>

#include "../../launcher/src/supervisor_link.h"
#include "../runtime/base/temp_dir.h"

namespace lockstep::launcher {
namespace {

using testing::HasSubstr;
using namespace std::chrono_literals;
using Clock = SecureChannel::Clock;

size_t open_files() {
  const auto entries = std::filesystem::directory_iterator("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(entries), end(entries)));
}

class AgentServerTest : public testing::Test {
 protected:
  AgentServerTest() { write_rendezvous(folder_.path(), {"127.0.0.1", server_.port(), token_}); }

  UniqueFd stranger() {
    UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in where{};
    where.sin_family = AF_INET;
    where.sin_port = htons(server_.port());
    ::inet_pton(AF_INET, "127.0.0.1", &where.sin_addr);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&where), sizeof(where)), 0);
    return fd;
  }
  /// Whether the other end has closed it.
  static bool is_closed(const UniqueFd& fd) {
    std::array<char, 256> bytes{};
    for (;;) {
      const ssize_t size = ::recv(fd.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
      if (size == 0 || (size < 0 && errno != EAGAIN)) return true;
      if (size < 0) return false;
    }
  }
  void serve() {
    for (AgentServer::Event& event : server_.receive(now())) events_.push_back(std::move(event));
  }
  /// Both sides, until it holds.
  template <typename Condition>
  [[nodiscard]] bool until(SupervisorLink& link, Condition condition) {
    for (const auto end = Clock::now() + 5s; Clock::now() < end; std::this_thread::sleep_for(1ms)) {
      link.advance(now());
      serve();
      if (condition()) return true;
    }
    return false;
  }
  Clock::time_point now() const { return Clock::now() + ahead_; }

  const TempDir folder_;
  const Token token_ = Token::random();
  AgentServer server_{"127.0.0.1", token_, 2};
  std::vector<AgentServer::Event> events_;
  Clock::duration ahead_{};
};

TEST_F(AgentServerTest, AnAgentComesInByTheFileAndIsHeardAndAnswered) {
  SupervisorLink link(folder_.path());
  ASSERT_TRUE(until(link, [&] { return link.is_up(now()); }));
  link.send(
      Heartbeat{
          .host = "n3", .ranks = {{2, 9, 1}, {3, 9, 2}}, .timeout_ms = 3000, .step = 12, .out_of_memory_kills = 1},
      now());
  ASSERT_TRUE(until(link, [&] { return events_.size() == 1; }));
  const FromAgent heard = decode_from_agent(events_[0].body);
  ASSERT_TRUE(std::holds_alternative<Heartbeat>(heard));
  EXPECT_EQ(std::get<Heartbeat>(heard).ranks, (std::vector<RankTime>{{2, 9, 1}, {3, 9, 2}}));
  server_.send(events_[0].agent, encode(FromSupervisor(Ask{.number = 4, .tail = 7, .stacks = {3}})), now());
  std::optional<Ask> ask;
  ASSERT_TRUE(until(link, [&] { return (ask = link.next_ask()).has_value(); }));
  EXPECT_EQ(*ask, (Ask{.number = 4, .tail = 7, .stacks = {3}}));
  ahead_ = SupervisorLink::kAnswers + 1ms;
  EXPECT_FALSE(link.is_up(now())) << "a supervisor that says nothing does not decide";
  server_.send(events_[0].agent, encode(FromSupervisor(Heard{})), now());
  EXPECT_TRUE(until(link, [&] { return link.is_up(now()); })) << "one that speaks again does";
  server_.send(events_[0].agent, encode(FromSupervisor(JobOver{})), now());
  EXPECT_TRUE(until(link, [&] { return link.is_job_over(); }));
}

TEST_F(AgentServerTest, AnAgentThatGoesIsSeenToGo) {
  {
    SupervisorLink link(folder_.path());
    ASSERT_TRUE(until(link, [&] { return link.is_up(now()); }));
  }
  for (const auto end = Clock::now() + 5s; events_.empty() && Clock::now() < end;) serve();
  ASSERT_EQ(events_.size(), 1U);
  EXPECT_EQ(events_[0].body, "");
  EXPECT_EQ(server_.connections(), 0U);
  EXPECT_EQ(server_.strangers(), 0);
}

TEST_F(AgentServerTest, WithoutASupervisorAnAgentIsAlone) {
  const TempDir empty;
  SupervisorLink none(empty.path()), nowhere("");
  none.advance(now());
  nowhere.advance(now());
  EXPECT_FALSE(none.is_up(now()) || nowhere.is_up(now()));
  const TempDir wrong;
  write_rendezvous(wrong.path(), {"127.0.0.1", server_.port(), Token::random()});
  SupervisorLink link(wrong.path());
  EXPECT_TRUE(until(link, [&] { return server_.strangers() == 1; }));
  EXPECT_FALSE(link.is_up(now()));
  EXPECT_THAT(server_.first_stranger(), HasSubstr("127.0.0.1: it does not know the token"));
}

TEST_F(AgentServerTest, AHundredConnectionsKeepNobodyOutAndTakeNothing) {
  const size_t before = open_files();
  std::vector<UniqueFd> crowd;
  crowd.reserve(100);
  for (int i = 0; i < 100; ++i) crowd.push_back(stranger());
  for (int i = 0; i < 20; ++i) serve();
  EXPECT_EQ(server_.connections(), AgentServer::kMostStrangers);
  EXPECT_EQ(server_.strangers(), 100 - static_cast<int64_t>(AgentServer::kMostStrangers));
  SupervisorLink link(folder_.path());
  ASSERT_TRUE(until(link, [&] { return link.is_up(now()); })) << "kept out";
  ahead_ += SecureChannel::kHandshake;
  serve();
  EXPECT_EQ(server_.connections(), 1U) << "those that say nothing are dropped";
  EXPECT_TRUE(link.is_open());
  EXPECT_EQ(server_.strangers(), 100);
  for (const UniqueFd& fd : crowd) EXPECT_TRUE(is_closed(fd));
  crowd.clear();
  EXPECT_EQ(open_files(), before + 2) << "the agent's, at both ends";
  EXPECT_TRUE(events_.empty()) << "of strangers nothing is passed on";
}

TEST_F(AgentServerTest, StrangersThatTalkAreDroppedAtOnce) {
  const UniqueFd garbage = stranger(), slow = stranger();
  const std::string words(4096, 'x');
  ASSERT_GT(::send(garbage.get(), words.data(), words.size(), MSG_NOSIGNAL), 0);
  for (int i = 0; i < 55; ++i) {  // less than an answer
    ::send(slow.get(), "x", 1, MSG_NOSIGNAL);
    ahead_ += 40ms;
    serve();
    if (i == 5) {
      EXPECT_TRUE(is_closed(garbage));
      EXPECT_FALSE(is_closed(slow));
    }
  }
  EXPECT_TRUE(is_closed(slow));
  EXPECT_EQ(server_.strangers(), 2);
  EXPECT_TRUE(events_.empty());
}

TEST_F(AgentServerTest, StrangersAreDroppedInTimeHoweverBusyThePortIs) {
  SupervisorLink link(folder_.path());
  ASSERT_TRUE(until(link, [&] { return link.is_up(now()); }));
  const UniqueFd silent = stranger();
  size_t served = 0;
  for (int i = 0; i < 60; ++i) {
    events_.clear();
    link.send(Bye{}, now());
    ASSERT_TRUE(until(link, [&] { return !events_.empty(); }));  // there was something to receive each time
    served += events_.size();
    ahead_ += 50ms;
  }
  EXPECT_EQ(served, 60U);
  EXPECT_TRUE(is_closed(silent));
}

TEST_F(AgentServerTest, MoreAgentsThanThereAreHostsAreDropped) {
  std::vector<std::unique_ptr<SupervisorLink>> links;
  for (int i = 0; i < 2; ++i) {
    links.push_back(std::make_unique<SupervisorLink>(folder_.path()));
    ASSERT_TRUE(until(*links.back(), [&] { return links.back()->is_up(now()); }));
  }
  SupervisorLink third(folder_.path());
  for (int i = 0; i < 100; ++i) {
    third.advance(now());
    serve();
    std::this_thread::sleep_for(1ms);
  }
  EXPECT_FALSE(third.is_open());
  EXPECT_EQ(server_.connections(), 2U);
}

TEST(AgentServer, ListensAtNoOtherAddressThanItIsGiven) {
  const Token token = Token::random();
  EXPECT_THROW(AgentServer("0.0.0.0", token, 1), IoError);
  EXPECT_THROW(AgentServer("", token, 1), IoError);
  EXPECT_THROW(AgentServer("192.0.2.1", token, 1), IoError);  // RFC 5737: nobody's
  AgentServer server("127.0.0.2", token, 1);
  const UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in where{};
  where.sin_family = AF_INET;
  where.sin_port = htons(server.port());
  ::inet_pton(AF_INET, "127.0.0.1", &where.sin_addr);
  EXPECT_NE(::connect(fd.get(), reinterpret_cast<sockaddr*>(&where), sizeof(where)), 0);
}

}  // namespace
}  // namespace lockstep::launcher
