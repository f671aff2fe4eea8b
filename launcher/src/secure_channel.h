#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <lockstep/base/unique_handle.h>

namespace lockstep::launcher {

/// The secret of one start. Wiped with the object.
class Token {
 public:
  static constexpr size_t kBytes = 32;
  static Token random();
  static std::optional<Token> from_hex(std::string_view hex);  ///< nullopt: not 64 lower-case hex digits
  std::string hex() const;
  const uint8_t* data() const { return bytes_.data(); }
  ~Token();
  Token(const Token&) = default;
  Token& operator=(const Token&) = default;

 private:
  Token() = default;
  std::array<uint8_t, kBytes> bytes_{};
};

/// One end of a TCP connection between a supervisor (server) and an agent (client) that both know the token. It never
/// crosses the wire: each proves to the other that it has it, over nonces of both, before anything else is read.
///
/// On the wire, MAC(key, ...) being HMAC-SHA256 (RFC 2104) and labels 8 bytes, filled with zeros:
///
///   server  greeting  40   "LSAGENT1"  S: nonce, 32
///   client  answer    64   C: nonce, 32  MAC(token, "client" S C)
///   server  proof     32   MAC(token, "server" S C)
///   either  frame     36+n n: u32, little-endian, 1 to kMaxBody  MAC(key, i n body)  body
///
/// key is MAC(token, "fromsrv" S C) or MAC(token, "fromcli" S C) by who sends; i: u64, little-endian, counts the
/// frames of that way from 0. So an answer of another connection, a frame that comes again, is left out or goes the
/// wrong way is found. What frames say is not hidden: it is no secret.
///
///   Example: token 00 01 ... 1f, S 32 bytes aa, C 32 bytes bb. The answer is C and 67 bf 80 c1 ... f9 3c, the proof
///   24 d2 df eb ... 2c f4; the server's first frame, of body "a", is 01 00 00 00, 77 b1 32 6d ... 45 81, 61.
///   tests/launcher/secure_channel_test.cc has all the bytes, from Python's hmac.
///
/// A peer that sends anything else, begins and does not go on, or does not take what it is sent, is dropped.
/// Threads: one. Never blocks.
class SecureChannel {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Side { kServer, kClient };

  static constexpr size_t kMaxBody = (size_t{1} << 20) + 64;      // a report and what goes with it
  static constexpr size_t kMostUnsent = 4 * kMaxBody;             // one that does not read is dropped
  static constexpr std::chrono::milliseconds kHandshake{2'000};   // in all
  static constexpr std::chrono::milliseconds kFrameTakes{5'000};  // from its first byte; also for what is sent

  using Nonce = std::array<uint8_t, 32>;
  /// @param fd connected or connecting, nonblocking. @param nonce random, but for tests that know the answer.
  SecureChannel(UniqueFd fd, const Token& token, Side side, Clock::time_point now, const Nonce& nonce = random_nonce());
  static Nonce random_nonce();

  /// Sends and receives what is possible now, and looks at the deadlines.
  void advance(Clock::time_point now);
  /// The next body that has arrived whole and is the peer's; nullopt: none is there yet.
  std::optional<std::string> next();
  /// Only once is_open(). @throws std::logic_error larger than kMaxBody.
  void send(std::string_view body, Clock::time_point now);

  int fd() const { return fd_.get(); }
  bool wants_to_write() const { return !output_.empty(); }
  bool is_open() const { return state_ == State::kOpen; }  ///< the peer has proved that it knows the token
  bool is_over() const { return state_ == State::kOver; }  ///< nothing comes any more
  bool is_stranger() const { return is_stranger_; }        ///< over, and it did not prove anything
  const std::string& why() const { return why_; }          ///< that it is over

 private:
  enum class State { kGreeting, kAnswer, kProof, kOpen, kOver };
  using Mac = std::array<uint8_t, 32>;

  void end(const std::string& why);
  void read(Clock::time_point now);
  void write(Clock::time_point now);
  bool take(Clock::time_point now);  // one message out of the input
  void take_greeting();
  void take_answer();
  void take_proof();
  Mac mac_of_nonces(const char* label) const;
  Mac mac_of_frame(const Mac& key, uint64_t number, std::string_view size, std::string_view body) const;
  size_t wanted() const;  // bytes the next message has, as far as is known

  UniqueFd fd_;
  const Token token_;
  State state_;
  bool is_stranger_ = false;
  std::string why_, input_, output_;
  Nonce server_nonce_{}, client_nonce_{};
  Mac sending_key_{}, receiving_key_{};
  uint64_t sent_ = 0, received_ = 0;
  Clock::time_point deadline_;  // of the handshake, then of the frame that has begun
  Clock::time_point write_deadline_{};
  std::optional<std::string> body_;
};

/// Where a start's agents find their supervisor: a file of mode 0600 in its launch folder,
///   lockstep-agents 1 ADDRESS PORT TOKEN\n
struct Rendezvous {
  std::string address;  ///< IPv4, as digits
  uint16_t port = 0;
  Token token;
};
std::string rendezvous_path(const std::string& launch_folder);
/// @throws IoError.
void write_rendezvous(const std::string& launch_folder, const Rendezvous& rendezvous);
/// nullopt: none is there, or one that another user owns or may read, or that is no such file.
std::optional<Rendezvous> read_rendezvous(const std::string& launch_folder);

}  // namespace lockstep::launcher
