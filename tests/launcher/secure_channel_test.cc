// The channel between agents and their supervisor: what it says, byte by byte, whom it believes, and for how long it
// waits.
#include "../../launcher/src/secure_channel.h"

#include <cerrno>
#include <filesystem>
#include <fstream>

#include <fcntl.h>
#include <grp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "../runtime/base/temp_dir.h"

namespace lockstep::launcher {
namespace {

using testing::HasSubstr;
using namespace std::chrono_literals;
using Clock = SecureChannel::Clock;
using Side = SecureChannel::Side;

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

Token token_of(char digit) { return *Token::from_hex(std::string(64, digit)); }

std::pair<UniqueFd, UniqueFd> connected() {
  std::array<int, 2> ends{};
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends.data()), 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

std::string received(int fd) {
  std::array<char, 4096> bytes{};
  const ssize_t size = ::recv(fd, bytes.data(), bytes.size(), 0);
  return size > 0 ? std::string(bytes.data(), static_cast<size_t>(size)) : "";
}

void put(int fd, std::string_view bytes) {
  ASSERT_EQ(::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
}

std::string frame(const std::string& size, const std::string& mac, const std::string& body) {
  return from_hex(size) + mac + body;
}

/// A server, and the other end of its wire.
struct Served {
  explicit Served(const Token& token = token_of('1')) : Served(token, connected()) {}
  Served(const Token& token, std::pair<UniqueFd, UniqueFd> ends)
      : server(std::move(ends.first), token, Side::kServer, now), wire(std::move(ends.second)) {}
  void pass(Clock::duration time = 0ms) { server.advance(now += time); }
  Clock::time_point now = Clock::now();
  SecureChannel server;
  UniqueFd wire;
};

/// A server and a client, joined by a wire that a test can look at and write to.
struct Joined {
  explicit Joined(const Token& server_token = token_of('1'), const Token& client_token = token_of('1'))
      : Joined(server_token, client_token, connected(), connected()) {}
  Joined(const Token& server_token, const Token& client_token, std::pair<UniqueFd, UniqueFd> one,
         std::pair<UniqueFd, UniqueFd> two)
      : server(std::move(one.first), server_token, Side::kServer, now),
        client(std::move(two.first), client_token, Side::kClient, now),
        server_wire(std::move(one.second)),
        client_wire(std::move(two.second)) {}
  /// Passes on what both have sent. @return it: to the client, to the server.
  std::pair<std::string, std::string> pass() {
    server.advance(now);
    std::string to_client = received(server_wire.get());
    if (!to_client.empty() && !client.is_over()) put(client_wire.get(), to_client);
    client.advance(now);
    std::string to_server = received(client_wire.get());
    if (!to_server.empty() && !server.is_over()) put(server_wire.get(), to_server);
    server.advance(now);
    return {to_client, to_server};
  }
  void open() {
    pass();
    pass();
    ASSERT_TRUE(server.is_open() && client.is_open());
  }
  Clock::time_point now = Clock::now();
  SecureChannel server, client;
  UniqueFd server_wire, client_wire;
};

TEST(SecureChannel, SaysWhatAnotherImplementationSays) {
  const Token token = *Token::from_hex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f");
  SecureChannel::Nonce server_nonce{}, client_nonce{};
  server_nonce.fill(0xaa);
  client_nonce.fill(0xbb);
  const auto now = Clock::now();
  auto [one, wire] = connected();
  SecureChannel server(std::move(one), token, Side::kServer, now, server_nonce);
  server.advance(now);
  EXPECT_EQ(received(wire.get()), "LSAGENT1" + std::string(32, '\xaa'));
  const std::string answer =
      std::string(32, '\xbb') + from_hex("67bf80c1a2af8a0a1f3919906d086b3cfd50c3b695901690f70edaf1483ff93c");
  put(wire.get(), answer);
  server.advance(now);
  ASSERT_TRUE(server.is_open()) << server.why();
  EXPECT_EQ(received(wire.get()), from_hex("24d2dfeb8b03268c27d8e50d3e92fa9fcf7cf794191d6dcd66624f054ece2cf4"));
  server.send("a", now);
  server.send("a", now);
  EXPECT_EQ(received(wire.get()),
            frame("01000000", from_hex("77b1326d9824a13e5241ca659e46c97aecac79e6cffa728702bdbe408dfa4581"), "a") +
                frame("01000000", from_hex("cdaffed1ebf0ea8e85da15699f2d304f397416f30dd607c8bbcb307c80775e76"), "a"));

  auto [other, other_wire] = connected();
  SecureChannel client(std::move(other), token, Side::kClient, now, client_nonce);
  put(other_wire.get(), "LSAGENT1" + std::string(32, '\xaa'));
  client.advance(now);
  EXPECT_EQ(received(other_wire.get()), answer);
}

TEST(SecureChannel, CarriesBodiesBothWaysWholeAndInOrder) {
  Joined joined;
  joined.open();
  const std::string large(SecureChannel::kMaxBody, 'x');
  joined.client.send("one", joined.now);
  joined.client.send(large, joined.now);
  joined.server.send("three", joined.now);
  std::vector<std::string> at_server, at_client;
  for (int i = 0; i < 2000; ++i) {
    joined.pass();
    while (auto body = joined.server.next()) at_server.push_back(*body), joined.server.advance(joined.now);
    while (auto body = joined.client.next()) at_client.push_back(*body);
  }
  EXPECT_THAT(at_server, testing::ElementsAre("one", large));
  EXPECT_THAT(at_client, testing::ElementsAre("three"));
  EXPECT_THROW(joined.client.send(large + "x", joined.now), std::logic_error);
  EXPECT_THROW(joined.client.send("", joined.now), std::logic_error);
}

TEST(SecureChannel, LastWordsAreHeardThoughNothingCanBeSaidToTheOneThatWent) {
  Joined joined;
  joined.open();
  joined.client.send("last report", joined.now);
  joined.client.send("bye", joined.now);
  joined.client.advance(joined.now);
  put(joined.server_wire.get(), received(joined.client_wire.get()));
  joined.server_wire.reset();
  joined.server.send("a question", joined.now);
  joined.server.advance(joined.now);
  EXPECT_EQ(joined.server.next(), "last report");
  joined.server.advance(joined.now);
  EXPECT_EQ(joined.server.next(), "bye");
  joined.server.advance(joined.now);
  EXPECT_TRUE(joined.server.is_over() && !joined.server.is_stranger());
}

TEST(SecureChannel, TheTokenNeverCrossesTheWire) {
  const Token token = token_of('7');
  const std::string bytes(reinterpret_cast<const char*>(token.data()), Token::kBytes);
  Joined joined(token, token);
  std::string all;
  for (int i = 0; i < 3; ++i) {
    const auto [to_client, to_server] = joined.pass();
    all += to_client + to_server;
    joined.client.send("h", joined.now);
  }
  ASSERT_TRUE(joined.server.is_open());
  EXPECT_EQ(all.find(bytes), std::string::npos);
  EXPECT_EQ(all.find(token.hex()), std::string::npos);
}

TEST(SecureChannel, AClientWithAnotherTokenIsDroppedUnheard) {
  Joined joined(token_of('1'), token_of('2'));
  for (int i = 0; i < 3; ++i) joined.pass();
  EXPECT_TRUE(joined.server.is_over());
  EXPECT_TRUE(joined.server.is_stranger());
  EXPECT_THAT(joined.server.why(), HasSubstr("does not know the token"));
  EXPECT_FALSE(joined.client.is_open());
}

// Somebody who took over the port of a supervisor that is gone.
TEST(SecureChannel, AServerWithoutTheTokenIsNotTold) {
  auto [mine, wire] = connected();
  const auto now = Clock::now();
  SecureChannel client(std::move(mine), token_of('1'), Side::kClient, now);
  put(wire.get(), "LSAGENT1" + std::string(32, 'n'));
  client.advance(now);
  const std::string answer = received(wire.get());
  ASSERT_EQ(answer.size(), 64U);
  put(wire.get(), answer.substr(32));  // the client's own proof, back to it
  client.advance(now);
  EXPECT_TRUE(client.is_over());
  EXPECT_FALSE(client.is_open());
  client.send("a report", now);
  EXPECT_EQ(received(wire.get()), "");
}

TEST(SecureChannel, AnAnswerOfAnotherConnectionIsNoAnswer) {
  Joined first;
  first.server.advance(first.now);
  put(first.client_wire.get(), received(first.server_wire.get()));
  first.client.advance(first.now);
  const std::string answer = received(first.client_wire.get());
  put(first.server_wire.get(), answer);
  first.server.advance(first.now);
  ASSERT_TRUE(first.server.is_open()) << "it is good where it belongs";

  Served second;
  second.pass();
  put(second.wire.get(), answer);
  second.pass();
  EXPECT_TRUE(second.server.is_stranger());
}

TEST(SecureChannel, FramesThatComeAgainOrAreChangedOrGoBackEndTheConnection) {
  enum class Deed { kAgain, kChange, kBack, kLeaveOut };
  for (const Deed deed : {Deed::kAgain, Deed::kChange, Deed::kBack, Deed::kLeaveOut}) {
    Joined joined;
    joined.open();
    joined.client.send("first", joined.now);
    const std::string first = received(joined.client_wire.get());
    joined.client.send("second", joined.now);
    std::string second = received(joined.client_wire.get());
    if (deed == Deed::kChange) second.back() ^= 1;
    if (deed != Deed::kLeaveOut) put(joined.server_wire.get(), first);
    if (deed == Deed::kBack) {
      put(joined.client_wire.get(), first);
      joined.client.advance(joined.now);
      EXPECT_TRUE(joined.client.is_over());
      EXPECT_EQ(joined.client.next(), std::nullopt);
      continue;
    }
    put(joined.server_wire.get(), deed == Deed::kAgain ? first : second);
    joined.server.advance(joined.now);
    EXPECT_EQ(joined.server.next().value_or("-"), deed == Deed::kLeaveOut ? "-" : "first");
    joined.server.advance(joined.now);
    EXPECT_EQ(joined.server.next(), std::nullopt);
    EXPECT_TRUE(joined.server.is_over());
    EXPECT_THAT(joined.server.why(), HasSubstr("not its own"));
    EXPECT_FALSE(joined.server.is_stranger());
  }
}

TEST(SecureChannel, OversizedFramesAreRefusedBeforeTheyTakeMemory) {
  for (const std::string size : {"00000000", "41001000", "ffffffff"}) {
    Joined joined;
    joined.open();
    put(joined.server_wire.get(), from_hex(size) + std::string(100, 'x'));
    joined.server.advance(joined.now);
    EXPECT_TRUE(joined.server.is_over()) << size;
    EXPECT_THAT(joined.server.why(), HasSubstr("a frame of"));
  }
}

TEST(SecureChannel, GarbageIsAStranger) {
  Served served;
  served.pass();
  put(served.wire.get(), "GET / HTTP/1.1\r\nHost: gpu07\r\nUser-Agent: scanner/1.0 (everything)\r\n\r\n");
  served.pass();
  EXPECT_TRUE(served.server.is_stranger());
  auto [mine, wire] = connected();
  SecureChannel client(std::move(mine), token_of('1'), Side::kClient, served.now);
  put(wire.get(), "SSH-2.0-OpenSSH_9.2p1 and so on, for more than forty bytes\r\n");
  client.advance(served.now);
  EXPECT_TRUE(client.is_stranger());
  EXPECT_EQ(received(wire.get()), "") << "it must not answer to that";
}

TEST(SecureChannel, OneThatSaysNothingHasTwoSeconds) {
  Served served;
  served.pass(1'999ms);
  EXPECT_FALSE(served.server.is_over());
  served.pass(1ms);
  EXPECT_TRUE(served.server.is_stranger());
  EXPECT_THAT(served.server.why(), HasSubstr("says nothing"));
}

// A byte now and then does not buy time.
TEST(SecureChannel, OneThatIsSlowHasTwoSecondsInAllAndFiveForAFrame) {
  Served served;
  for (int i = 0; i < 19; ++i) {
    put(served.wire.get(), "x");
    served.pass(100ms);
    ASSERT_FALSE(served.server.is_over()) << i;
  }
  put(served.wire.get(), "x");
  served.pass(100ms);
  EXPECT_TRUE(served.server.is_over());

  Joined joined;
  joined.open();
  joined.server.advance(joined.now += 1h);
  ASSERT_TRUE(joined.server.is_open()) << "between frames it may be silent: heartbeats are others' business";
  joined.client.send(std::string(1000, 'x'), joined.now);
  const std::string whole = received(joined.client_wire.get());
  for (size_t i = 0; i < 49; ++i) {
    put(joined.server_wire.get(), whole.substr(i, 1));
    joined.server.advance(joined.now += 100ms);
    ASSERT_TRUE(joined.server.is_open()) << i;
  }
  joined.server.advance(joined.now += 200ms);
  EXPECT_TRUE(joined.server.is_over());
  EXPECT_THAT(joined.server.why(), HasSubstr("does not go on"));
}

TEST(SecureChannel, OneThatDoesNotReadIsDropped) {
  Joined joined;
  joined.open();
  const std::string body(SecureChannel::kMaxBody, 'x');
  for (int i = 0; i < 8 && joined.server.is_open(); ++i) joined.server.send(body, joined.now);
  EXPECT_TRUE(joined.server.is_over()) << "memory for it is bounded";
  Joined later;
  later.open();
  later.server.send(body, later.now);
  later.server.advance(later.now += 4'900ms);
  EXPECT_TRUE(later.server.is_open());
  later.server.advance(later.now += 200ms);
  EXPECT_TRUE(later.server.is_over());
}

TEST(Rendezvous, IsItsUsersAloneAndComesBackAsItWas) {
  const TempDir folder;
  const Token token = Token::random();
  ::umask(0);
  write_rendezvous(folder.path(), {"10.77.0.254", 43211, token});
  ::umask(077);
  struct stat found {};
  ASSERT_EQ(::stat(rendezvous_path(folder.path()).c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 07777, 0600U);
  const auto read = read_rendezvous(folder.path());
  ASSERT_TRUE(read);
  EXPECT_EQ(read->address, "10.77.0.254");
  EXPECT_EQ(read->port, 43211);
  EXPECT_EQ(read->token.hex(), token.hex());
  EXPECT_THROW(write_rendezvous(folder.path(), {"10.77.0.254", 1, token}), std::runtime_error) << "it is there already";
  EXPECT_NE(Token::random().hex(), token.hex());
}

TEST(Rendezvous, OfOthersOrForOthersOrNoneIsNotBelieved) {
  const TempDir folder;
  const std::string path = rendezvous_path(folder.path()),
                    good = "lockstep-agents 1 127.0.0.1 99 " + std::string(64, 'a') + "\n";
  const auto read = [&](const std::string& text, mode_t mode = 0600) {
    std::filesystem::remove(path);
    std::ofstream(path) << text;
    ::chmod(path.c_str(), mode);
    return read_rendezvous(folder.path());
  };
  EXPECT_TRUE(read(good));
  EXPECT_FALSE(read(good, 0640));
  EXPECT_FALSE(read(good, 0604));
  for (const std::string& bad : {std::string(), good.substr(0, good.size() - 1), "lockstep-agents 2" + good.substr(17),
                                 std::string("\n"), "lockstep-agents 1 gpu07 99 " + std::string(64, 'a') + "\n",
                                 "lockstep-agents 1 127.0.0.1 0 " + std::string(64, 'a') + "\n",
                                 "lockstep-agents 1 127.0.0.1 99 " + std::string(63, 'a') + "g\n",
                                 std::string("lockstep-agents 1 127.0.0.1 99 aa\n"), std::string(5000, 'a') + "\n"})
    EXPECT_FALSE(read(bad)) << bad;
  std::filesystem::remove(path);
  std::ofstream(folder / "elsewhere") << good;
  ::chmod((folder / "elsewhere").c_str(), 0600);
  std::filesystem::create_symlink(folder / "elsewhere", path);
  EXPECT_FALSE(read_rendezvous(folder.path())) << "a link";
  std::filesystem::remove(path);
  ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
  EXPECT_FALSE(read_rendezvous(folder.path())) << "a FIFO, which must not hold it up";
  EXPECT_FALSE(read_rendezvous(""));
}

TEST(Rendezvous, ASecondUserCannotReadIt) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root may become somebody else";
  const TempDir folder;
  ::chmod(folder.path().c_str(), 0755);
  write_rendezvous(folder.path(), {"127.0.0.1", 99, Token::random()});
  const pid_t child = ::fork();
  if (child == 0) {
    const bool is_other =
        ::setgroups(0, nullptr) == 0 && ::setresgid(65534, 65534, 65534) == 0 && ::setresuid(65534, 65534, 65534) == 0;
    const bool reads = ::open(rendezvous_path(folder.path()).c_str(), O_RDONLY) >= 0;
    const bool is_refused = errno == EACCES;
    ::_exit(!is_other ? 3 : reads ? 1 : !is_refused ? 2 : 0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0) << "1: it can; 2: not for want of rights; 3: this test is wrong";
  ASSERT_EQ(::chown(rendezvous_path(folder.path()).c_str(), 65534, 65534), 0);
  EXPECT_FALSE(read_rendezvous(folder.path())) << "and one that belongs to somebody else is not believed";
}

}  // namespace
}  // namespace lockstep::launcher
