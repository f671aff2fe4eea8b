// The metrics endpoint over real sockets: what it serves, whom it refuses, and that nobody keeps others out.
#include <ctime>
#include <fstream>
#include <set>
#include <thread>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/fs.h>
#include <lockstep/base/unique_handle.h>
#include <lockstep/metrics/endpoint.h>

#include "../../support/log_catcher.h"
#include "exposition_checker.h"
#include "http.h"
#include "temp_dir.h"

namespace lockstep::metrics {
namespace {

using namespace std::chrono_literals;
using std::chrono::steady_clock;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::StartsWith;

constexpr auto kLong = 1h;  // what must not happen by the passing of time

/// Polls until it holds, for a minute at most.
template <typename Condition>
bool eventually(Condition condition) {
  for (const auto start = steady_clock::now(); steady_clock::now() - start < 60s; std::this_thread::sleep_for(2ms)) {
    if (condition()) return true;
  }
  return condition();
}

UniqueFd connect_with(UniqueFd fd, int port) {
  const sockaddr_in v4 = {
      .sin_family = AF_INET, .sin_port = htons(static_cast<uint16_t>(port)), .sin_addr = {htonl(INADDR_LOOPBACK)}};
  const sockaddr_in6 v6 = {
      .sin6_family = AF_INET6, .sin6_port = htons(static_cast<uint16_t>(port)), .sin6_addr = in6addr_loopback};
  int family = AF_INET;
  socklen_t size = sizeof(family);
  getsockopt(fd.get(), SOL_SOCKET, SO_DOMAIN, &family, &size);
  EXPECT_EQ(family == AF_INET ? connect(fd.get(), reinterpret_cast<const sockaddr*>(&v4), sizeof(v4))
                              : connect(fd.get(), reinterpret_cast<const sockaddr*>(&v6), sizeof(v6)),
            0);
  const timeval limit{60, 0};
  setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  return fd;
}

UniqueFd connect_to(int port, int family = AF_INET) {
  return connect_with(UniqueFd(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0)), port);
}

/// @return whether all of it was taken.
bool say(const UniqueFd& fd, const std::string& text) {
  for (size_t sent = 0; sent < text.size();) {
    const ssize_t n = send(fd.get(), text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += static_cast<size_t>(n);
  }
  return true;
}

/// All that comes until the other side is done.
std::string hear(const UniqueFd& fd) {
  std::string text;
  char chunk[4096];
  for (ssize_t n = 0; (n = recv(fd.get(), chunk, sizeof(chunk), 0)) > 0;) text.append(chunk, static_cast<size_t>(n));
  return text;
}

std::string ask(int port, const std::string& request, int family = AF_INET) {
  const UniqueFd fd = connect_to(port, family);
  say(fd, request);
  return hear(fd);
}

std::string get(int port, const std::string& path, int family = AF_INET) {
  return ask(port, "GET " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n", family);
}

std::string body_of(const std::string& answer) { return answer.substr(answer.find("\r\n\r\n") + 4); }

double cpu_s() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

class EndpointTest : public testing::Test {
 protected:
  RunMeter meter_{{.planned_steps = 10, .samples_per_step = 4}};
};

TEST_F(EndpointTest, ServesTheFiguresOfTheMoment) {
  const Endpoint endpoint({}, meter_);
  EXPECT_THAT(body_of(get(endpoint.port(), "/metrics")), HasSubstr("\nlockstep_step 0\n"));
  meter_.step({.step = 7, .loss = 2.5, .seconds = 0.25});
  const std::string answer = get(endpoint.port(), "/metrics");
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"));
  EXPECT_THAT(exposition_problems(body_of(answer)), IsEmpty());
  EXPECT_EQ(body_of(answer), meter_.exposition());
  EXPECT_EQ(exposition_samples(body_of(answer)).at("lockstep_step"), 7);
  const std::string head = ask(endpoint.port(), "HEAD /metrics HTTP/1.1\r\n\r\n");
  EXPECT_EQ(head, answer.substr(0, answer.size() - body_of(answer).size()));
}

TEST_F(EndpointTest, HealthIsAStatusAndAReason) {
  RunMeter meter({.patience = 300ms});
  const Endpoint endpoint({}, meter);
  meter.step({.step = 3, .seconds = 0.001});
  EXPECT_TRUE(eventually([&] {
    meter.progress();
    return get(endpoint.port(), "/healthz").starts_with("HTTP/1.1 200 OK");
  }));
  std::string answer;
  EXPECT_TRUE(eventually([&] { return (answer = get(endpoint.port(), "/healthz")).starts_with("HTTP/1.1 503 "); }));
  EXPECT_THAT(body_of(answer), StartsWith("nothing finished for "));
  EXPECT_THAT(body_of(answer), EndsWith("the last was step 3\n"));
}

// What is still under way when the answer is ready is read, lest the connection be reset and the answer lost.
TEST_F(EndpointTest, RefusalsReachTheClientThoughItIsStillSending) {
  const Endpoint endpoint({.deadline = kLong}, meter_);
  const auto status = [&](const std::string& request) {
    const UniqueFd fd = connect_to(endpoint.port());
    EXPECT_TRUE(say(fd, request));
    return hear(fd).substr(0, 13);
  };
  const std::string much(8 << 20, 'a');
  EXPECT_EQ(status("GET /" + much), "HTTP/1.1 414 ");
  EXPECT_EQ(status("GET /metrics HTTP/1.1\r\na: " + much), "HTTP/1.1 431 ");
  EXPECT_EQ(status("POST /metrics HTTP/1.1\r\nContent-Length: 8388608\r\n\r\n" + much), "HTTP/1.1 405 ");
  EXPECT_EQ(status("GET /etc/passwd HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 ");
  EXPECT_EQ(status(std::string("\x16\x03\x01\x02\x00\x01", 6)), "HTTP/1.1 400 ");
}

TEST_F(EndpointTest, ARequestMayComeInPieces) {
  const Endpoint endpoint({.deadline = kLong}, meter_);
  const UniqueFd fd = connect_to(endpoint.port());
  const std::string request = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";
  for (const char c : request) {
    say(fd, std::string(1, c));
    std::this_thread::sleep_for(1ms);  // else TCP joins them
  }
  EXPECT_THAT(hear(fd), StartsWith("HTTP/1.1 200 OK"));
}

TEST_F(EndpointTest, WhoDoesNotAskInTimeIsSentAway) {
  const Endpoint endpoint({.deadline = 200ms}, meter_);
  const UniqueFd silent = connect_to(endpoint.port()), half = connect_to(endpoint.port());
  say(half, "GET /metrics HTT");
  EXPECT_THAT(hear(half), StartsWith("HTTP/1.1 408 "));
  EXPECT_THAT(hear(silent), StartsWith("HTTP/1.1 408 "));
}

TEST_F(EndpointTest, WhoKeepsSendingIsSentAwayTooAndWhoNeverHangsUp) {
  const Endpoint endpoint({.deadline = 200ms}, meter_);
  const UniqueFd answered = connect_to(endpoint.port()), dripping = connect_to(endpoint.port());
  say(answered, "GET /healthz HTTP/1.1\r\n\r\n");
  EXPECT_THAT(hear(answered), StartsWith("HTTP/1.1 200 "));
  say(dripping, "GET /metrics HTTP/1.1\r\na: ");
  const auto is_closed = [](const UniqueFd& fd, const std::string& more) { return !say(fd, more); };
  EXPECT_TRUE(eventually([&] { return is_closed(dripping, "a"); }));
  const std::string flood(1 << 20, 'a');  // there is always more to read
  const auto start = steady_clock::now();
  while (!is_closed(answered, flood)) ASSERT_LT(steady_clock::now() - start, 60s);
}

TEST_F(EndpointTest, SixtyFourIdleClientsKeepNobodyOut) {
  const Endpoint endpoint({.deadline = kLong}, meter_);  // so nobody goes by the passing of time
  std::vector<UniqueFd> idle(64);
  for (UniqueFd& fd : idle) fd = connect_to(endpoint.port());
  for (int i = 0; i < 3; ++i) EXPECT_THAT(get(endpoint.port(), "/metrics"), StartsWith("HTTP/1.1 200 OK"));
  // Of the 64 as many are still held as there is room for; the others were told.
  int told = 0;
  for (const UniqueFd& fd : idle) {
    char byte = 0;
    told += recv(fd.get(), &byte, 1, MSG_DONTWAIT) == 1;
  }
  EXPECT_GE(told, 64 - 16);
  EXPECT_LT(told, 64);
}

// 64 silent clients that come back whenever they are sent away: how often they are, and the processor time of this
// process meanwhile.
TEST_F(EndpointTest, IdleClientsCostNextToNothing) {
  const Endpoint endpoint({}, meter_);
  std::vector<UniqueFd> idle(64);
  int sent_away = -64;
  const double cpu_before = cpu_s();
  const auto start = steady_clock::now();
  std::chrono::duration<double> took{};
  while ((took = steady_clock::now() - start) < 1s) {
    for (UniqueFd& fd : idle) {
      char chunk[1024];
      if (fd && recv(fd.get(), chunk, sizeof(chunk), MSG_DONTWAIT) < 0) continue;
      fd = connect_to(endpoint.port());
      ++sent_away;
    }
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_LE(sent_away, 16 * (took / 100ms + 1)) << "each has 100 ms for itself";
  RecordProperty("cpu_share", std::to_string((cpu_s() - cpu_before) / took.count()));
  EXPECT_LT((cpu_s() - cpu_before) / took.count(), 0.3) << "of a core, most of it ours";
}

TEST_F(EndpointTest, ConnectionsHoldNoMoreFilesThanAgreed) {
  const Endpoint endpoint({.deadline = kLong}, meter_);
  const auto num_open = [] {
    int count = 0;
    for (int fd = 0; fd < 1024; ++fd) count += fcntl(fd, F_GETFD) >= 0;
    return count;
  };
  get(endpoint.port(), "/metrics");
  const int before = num_open();
  std::vector<UniqueFd> idle(40);
  for (UniqueFd& fd : idle) fd = connect_to(endpoint.port());
  int most = 0;
  for (int i = 0; i < 10; ++i) {
    EXPECT_THAT(get(endpoint.port(), "/healthz"), StartsWith("HTTP/1.1 200 OK"));
    most = std::max(most, num_open() - before - static_cast<int>(idle.size()));
  }
  EXPECT_LE(most, 16);
}

TEST_F(EndpointTest, ATakenPortIsAWarningAndIsTriedAgain) {
  auto first = std::make_unique<Endpoint>(EndpointOptions{}, meter_);
  const int port = first->port();
  const test::LogCatcher warnings(google::GLOG_WARNING);
  const Endpoint second({.port = port, .retry = 20ms}, meter_);
  EXPECT_EQ(second.port(), 0);
  EXPECT_THAT(warnings.text(),
              HasSubstr("no metrics at 127.0.0.1 port " + std::to_string(port) + ": Address already in use"));
  EXPECT_THAT(warnings.text(), HasSubstr("training goes on"));
  EXPECT_THAT(get(port, "/metrics"), StartsWith("HTTP/1.1 200 OK")) << "from the first";
  const std::string said = warnings.text();
  first.reset();
  EXPECT_TRUE(eventually([&] { return second.port() == port; }));
  EXPECT_THAT(get(port, "/metrics"), StartsWith("HTTP/1.1 200 OK")) << "from the second";
  EXPECT_EQ(warnings.text(), said) << "once is enough";
}

TEST_F(EndpointTest, IPv6LoopbackIsAsGood) {
  const test::LogCatcher warnings(google::GLOG_WARNING);
  const Endpoint endpoint({.bind = "::1"}, meter_);
  if (endpoint.port() == 0) GTEST_SKIP() << "no IPv6 here: " << warnings.text();
  EXPECT_THAT(get(endpoint.port(), "/metrics", AF_INET6), StartsWith("HTTP/1.1 200 OK"));
  EXPECT_EQ(warnings.text(), "");
}

TEST_F(EndpointTest, AnyOtherAddressGetsAWarning) {
  const test::LogCatcher warnings(google::GLOG_WARNING);
  { const Endpoint endpoint({.bind = "127.0.0.2"}, meter_); }
  EXPECT_EQ(warnings.text(), "");
  const Endpoint endpoint({.bind = "0.0.0.0"}, meter_);
  EXPECT_THAT(warnings.text(), HasSubstr("whoever reaches this address can read"));
  EXPECT_THAT(get(endpoint.port(), "/healthz"), StartsWith("HTTP/1.1 200 OK"));
}

TEST_F(EndpointTest, AnAddressThatIsNotOursIsAWarning) {
  const test::LogCatcher warnings(google::GLOG_WARNING);
  const Endpoint endpoint({.bind = "192.0.2.1"}, meter_);  // RFC 5737: nobody's
  EXPECT_EQ(endpoint.port(), 0);
  EXPECT_THAT(warnings.text(), HasSubstr("192.0.2.1"));
}

TEST(AddressTest, IsANumberOfEitherKindAndNothingElse) {
  for (const char* good : {"127.0.0.1", "0.0.0.0", "::1", "::", "fd00::1"}) EXPECT_TRUE(is_address(good)) << good;
  for (const char* bad : {"", "localhost", "127.1", "[::1]", "127.0.0.1:80", "1.2.3.4.5", "::1 "})
    EXPECT_FALSE(is_address(bad)) << bad;
}

// Whoever comes while no file is left is served once there are some again.
TEST_F(EndpointTest, RunningOutOfFilesIsNoEndAndNoSpinning) {
  const Endpoint endpoint({}, meter_);
  UniqueFd client(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  const rlimit few{64, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  std::vector<UniqueFd> taken;
  do {
    taken.emplace_back(dup(client.get()));
  } while (taken.back());
  client = connect_with(std::move(client), endpoint.port());
  const double cpu_before = cpu_s();
  std::this_thread::sleep_for(200ms);
  EXPECT_LT(cpu_s() - cpu_before, 0.1);
  taken.clear();
  setrlimit(RLIMIT_NOFILE, &before);
  say(client, "GET /healthz HTTP/1.1\r\n\r\n");
  EXPECT_THAT(hear(client), StartsWith("HTTP/1.1 200 OK"));
}

class TextFileTest : public testing::Test {
 protected:
  std::string text() { return read_text(real_fs(), path_, 1 << 20); }

  TempDir dir_;
  std::string path_ = dir_ / "lockstep.prom";
  RunMeter meter_{{.planned_steps = 10}};
};

TEST_F(TextFileTest, HoldsThePageForAnyCollectorAndTheLastOneAtTheEnd) {
  umask(077);
  {
    const TextFile file(path_, meter_, kLong);
    ASSERT_TRUE(eventually([&] { return std::ifstream(path_).good(); }));
    EXPECT_THAT(exposition_problems(text()), IsEmpty());
    struct stat status {};
    ASSERT_EQ(stat(path_.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0644u);
    meter_.step({.step = 9, .seconds = 0.1});
  }
  EXPECT_EQ(text(), meter_.exposition());
  EXPECT_THAT(real_fs().list_directory(dir_.path()), testing::ElementsAre("lockstep.prom"));
}

TEST_F(TextFileTest, NoReaderSeesHalfOfIt) {
  const TextFile file(path_, meter_, 1ms);
  ASSERT_TRUE(eventually([&] { return std::ifstream(path_).good(); }));
  std::set<std::string> pages;
  for (int64_t number = 1; pages.size() < 50; ++number) {
    meter_.step({.step = number, .loss = 1.0 / static_cast<double>(number), .seconds = 0.001});
    const std::string page = text();
    pages.insert(page);
    ASSERT_THAT(exposition_problems(page), IsEmpty());
    ASSERT_THAT(page, HasSubstr("lockstep_checkpoint_stall_seconds_total 0\n")) << "its last line";
  }
}

TEST_F(TextFileTest, StorageThatFailsIsAWarningUntilItWorks) {
  const test::LogCatcher warnings(google::GLOG_WARNING);
  path_ = dir_ / "later/lockstep.prom";
  const TextFile file(path_, meter_, 2ms);
  ASSERT_TRUE(eventually([&] { return !warnings.text().empty(); }));
  std::this_thread::sleep_for(20ms);  // several tries
  const std::string said = warnings.text();
  EXPECT_THAT(said, HasSubstr("later/lockstep.prom"));
  EXPECT_THAT(said, HasSubstr("No such file or directory"));
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1);
  real_fs().make_directory(dir_ / "later");
  EXPECT_TRUE(eventually([&] { return std::ifstream(path_).good(); }));
}

// What a start that was killed left, or what somebody put there to have us write elsewhere.
TEST_F(TextFileTest, WhatLiesInTheWayIsReplacedNotFollowed) {
  write_durable(real_fs(), dir_ / "precious", "mine");
  ASSERT_EQ(symlink("precious", (path_ + ".new").c_str()), 0);
  ASSERT_EQ(symlink("precious", path_.c_str()), 0);
  { const TextFile file(path_, meter_, kLong); }
  EXPECT_EQ(read_text(real_fs(), dir_ / "precious", 100), "mine");
  EXPECT_EQ(text(), meter_.exposition());
}

}  // namespace
}  // namespace lockstep::metrics
