#include "secure_channel.h"

#include <cerrno>
#include <charconv>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sodium.h>

#include <lockstep/base/error.h>

namespace lockstep::launcher {
namespace {

constexpr std::string_view kMagic = "LSAGENT1";
constexpr size_t kNonce = 32, kMac = 32, kSizeBytes = 4, kLabel = 8;
constexpr size_t kGreetingBytes = kMagic.size() + kNonce, kAnswerBytes = kNonce + kMac, kProofBytes = kMac;
constexpr size_t kReadAtOnce = 256 << 10;  // the others have their turn then
constexpr size_t kMaxRendezvous = 256;

static_assert(crypto_auth_hmacsha256_BYTES == kMac && crypto_auth_hmacsha256_KEYBYTES == Token::kBytes);

void init_sodium() {
  if (::sodium_init() < 0) throw ConfigError("this machine has no source of random numbers");
}

template <size_t N>
std::string_view text_of(const std::array<uint8_t, N>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), N};
}

template <typename Number>
std::string little_endian(Number value) {
  std::string bytes(sizeof(value), '\0');
  for (char& byte : bytes) byte = static_cast<char>(value & 0xff), value >>= 8;
  return bytes;
}

size_t frame_size(std::string_view bytes) {
  size_t size = 0;
  for (size_t i = kSizeBytes; i-- > 0;) size = size << 8 | static_cast<uint8_t>(bytes[i]);
  return size;
}

class Hmac {
 public:
  explicit Hmac(const uint8_t* key) { ::crypto_auth_hmacsha256_init(&state_, key, 32); }
  Hmac& add(std::string_view bytes) {
    ::crypto_auth_hmacsha256_update(&state_, reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    return *this;
  }
  std::array<uint8_t, kMac> end() {
    std::array<uint8_t, kMac> mac{};
    ::crypto_auth_hmacsha256_final(&state_, mac.data());
    return mac;
  }

 private:
  crypto_auth_hmacsha256_state state_;
};

bool is_equal(const std::array<uint8_t, kMac>& mac, std::string_view bytes) {  // in constant time
  return bytes.size() == kMac && ::sodium_memcmp(mac.data(), bytes.data(), kMac) == 0;
}

}  // namespace

Token Token::random() {
  init_sodium();
  Token token;
  ::randombytes_buf(token.bytes_.data(), kBytes);
  return token;
}

std::optional<Token> Token::from_hex(std::string_view hex) {
  Token token;
  if (hex.size() != 2 * kBytes || hex.find_first_not_of("0123456789abcdef") != std::string_view::npos)
    return std::nullopt;
  size_t size = 0;
  if (::sodium_hex2bin(token.bytes_.data(), kBytes, hex.data(), hex.size(), nullptr, &size, nullptr) != 0)
    return std::nullopt;
  return token;
}

std::string Token::hex() const {
  std::array<char, 2 * kBytes + 1> text{};
  return ::sodium_bin2hex(text.data(), text.size(), bytes_.data(), kBytes);
}

Token::~Token() { ::sodium_memzero(bytes_.data(), kBytes); }

SecureChannel::Nonce SecureChannel::random_nonce() {
  init_sodium();
  Nonce nonce{};
  ::randombytes_buf(nonce.data(), nonce.size());
  return nonce;
}

SecureChannel::SecureChannel(UniqueFd fd, const Token& token, Side side, Clock::time_point now, const Nonce& nonce)
    : fd_(std::move(fd)),
      token_(token),
      state_(side == Side::kServer ? State::kAnswer : State::kGreeting),
      deadline_(now + kHandshake),
      write_deadline_(deadline_) {
  if (side == Side::kServer) {
    server_nonce_ = nonce;
    output_ = std::string(kMagic) + std::string(text_of(nonce));
  } else {
    client_nonce_ = nonce;
  }
}

void SecureChannel::end(const std::string& why) {
  if (state_ == State::kOver) return;
  is_stranger_ = state_ != State::kOpen;
  state_ = State::kOver;
  why_ = why;
  fd_.reset();
}

void SecureChannel::advance(Clock::time_point now) {
  if (is_over()) return;
  write(now);
  if (!body_ && !is_over()) read(now);
  if (!is_over()) write(now);
  if (is_over() || body_) return;
  const bool is_waited_for = !is_open() || !input_.empty();
  if (is_waited_for && now >= deadline_)
    return end(is_open() ? "it began a frame and does not go on" : "it says nothing");
  if (!output_.empty() && now >= write_deadline_) end("it does not read");
}

void SecureChannel::write(Clock::time_point now) {
  while (!output_.empty()) {
    const ssize_t written = ::send(fd_.get(), output_.data(), output_.size(), MSG_NOSIGNAL);
    if (written > 0) {
      output_.erase(0, static_cast<size_t>(written));
      if (is_open()) write_deadline_ = now + kFrameTakes;
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == EAGAIN || errno == ENOTCONN) return;  // ENOTCONN: not connected yet
    if (is_open()) return output_.clear();  // what the peer said before it went is still to be read, and so is its end
    return end(std::strerror(errno));
  }
}

size_t SecureChannel::wanted() const {
  switch (state_) {
    case State::kGreeting:
      return kGreetingBytes;
    case State::kAnswer:
      return kAnswerBytes;
    case State::kProof:
      return kProofBytes;
    default:
      return input_.size() < kSizeBytes ? kSizeBytes : kSizeBytes + kMac + frame_size(input_);
  }
}

// No more than the next message has: what a stranger sends beyond stays in the kernel.
void SecureChannel::read(Clock::time_point now) {
  std::array<char, 65536> bytes;  // NOLINT(cppcoreguidelines-pro-type-member-init): recv fills it
  for (size_t taken = 0; taken < kReadAtOnce;) {
    const size_t missing = std::min(wanted() - input_.size(), bytes.size());
    const ssize_t got = ::recv(fd_.get(), bytes.data(), missing, 0);
    if (got == 0) return end("it closed the connection");
    if (got < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != ENOTCONN) end(std::strerror(errno));
      return;
    }
    if (is_open() && input_.empty()) deadline_ = now + kFrameTakes;
    taken += static_cast<size_t>(got);
    input_.append(bytes.data(), static_cast<size_t>(got));
    if (!take(now)) return;
  }
}

// @return whether to read on.
bool SecureChannel::take(Clock::time_point now) {
  if (is_open() && input_.size() >= kSizeBytes) {
    const size_t size = frame_size(input_);
    if (size == 0 || size > kMaxBody) {
      end("it sent a frame of " + std::to_string(size) + " bytes");
      return false;
    }
  }
  if (input_.size() < wanted()) return true;
  if (is_open()) {
    const std::string_view all = input_, body = all.substr(kSizeBytes + kMac);
    const Mac mac = mac_of_frame(receiving_key_, received_++, all.substr(0, kSizeBytes), body);
    if (!is_equal(mac, all.substr(kSizeBytes, kMac))) {
      end("it sent a frame that is not its own");
    } else {
      body_ = body;
    }
    input_.clear();
    return false;
  }
  if (state_ == State::kGreeting) {
    take_greeting();
  } else if (state_ == State::kAnswer) {
    take_answer();
  } else {
    take_proof();
  }
  input_.clear();
  if (is_open()) write_deadline_ = now + kFrameTakes;
  return !is_over();
}

void SecureChannel::take_greeting() {
  if (!input_.starts_with(kMagic)) return end("it is no supervisor");
  std::memcpy(server_nonce_.data(), input_.data() + kMagic.size(), kNonce);
  const Mac mac = mac_of_nonces("client");
  output_ = std::string(text_of(client_nonce_)) + std::string(text_of(mac));
  state_ = State::kProof;
}

void SecureChannel::take_answer() {
  std::memcpy(client_nonce_.data(), input_.data(), kNonce);
  if (!is_equal(mac_of_nonces("client"), std::string_view(input_).substr(kNonce)))
    return end("it does not know the token");
  output_ += text_of(mac_of_nonces("server"));
  sending_key_ = mac_of_nonces("fromsrv");
  receiving_key_ = mac_of_nonces("fromcli");
  state_ = State::kOpen;
}

void SecureChannel::take_proof() {
  if (!is_equal(mac_of_nonces("server"), input_)) return end("it does not know the token");
  sending_key_ = mac_of_nonces("fromcli");
  receiving_key_ = mac_of_nonces("fromsrv");
  state_ = State::kOpen;
}

SecureChannel::Mac SecureChannel::mac_of_nonces(const char* label) const {
  std::string filled = label;
  filled.resize(kLabel);
  return Hmac(token_.data()).add(filled).add(text_of(server_nonce_)).add(text_of(client_nonce_)).end();
}

SecureChannel::Mac SecureChannel::mac_of_frame(const Mac& key, uint64_t number, std::string_view size,
                                               std::string_view body) const {
  return Hmac(key.data()).add(little_endian(number)).add(size).add(body).end();
}

std::optional<std::string> SecureChannel::next() { return std::exchange(body_, std::nullopt); }

void SecureChannel::send(std::string_view body, Clock::time_point now) {
  if (!is_open()) return;
  if (body.empty() || body.size() > kMaxBody)
    throw std::logic_error("a frame of " + std::to_string(body.size()) + " bytes");
  if (output_.size() + body.size() > kMostUnsent) return end("it does not read");
  if (output_.empty()) write_deadline_ = now + kFrameTakes;
  const std::string size = little_endian(static_cast<uint32_t>(body.size()));
  output_ += size;
  output_ += text_of(mac_of_frame(sending_key_, sent_++, size, body));
  output_ += body;
  write(now);
}

std::string rendezvous_path(const std::string& launch_folder) { return launch_folder + "/agents"; }

void write_rendezvous(const std::string& launch_folder, const Rendezvous& rendezvous) {
  const std::string path = rendezvous_path(launch_folder);
  std::string text = "lockstep-agents 1 " + rendezvous.address + " " + std::to_string(rendezvous.port) + " " +
                     rendezvous.token.hex() + "\n";
  const UniqueFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  const bool is_whole = file && ::fchmod(file.get(), 0600) == 0 &&
                        ::write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
                        ::fsync(file.get()) == 0;  // other hosts open it
  const int error = errno;
  ::sodium_memzero(text.data(), text.size());
  if (!is_whole) throw IoError("writing", path, error);
}

std::optional<Rendezvous> read_rendezvous(const std::string& launch_folder) {
  if (launch_folder.empty()) return std::nullopt;
  const UniqueFd file(::open(rendezvous_path(launch_folder).c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat found {};
  if (!file || ::fstat(file.get(), &found) != 0 || !S_ISREG(found.st_mode) || found.st_uid != ::geteuid() ||
      (found.st_mode & 077) != 0)
    return std::nullopt;
  std::array<char, kMaxRendezvous> bytes{};
  const ssize_t size = ::read(file.get(), bytes.data(), bytes.size());
  if (size <= 0 || bytes[static_cast<size_t>(size) - 1] != '\n') return std::nullopt;
  std::istringstream words(std::string(bytes.data(), static_cast<size_t>(size)));
  ::sodium_memzero(bytes.data(), bytes.size());
  std::string kind, version, address, hex;
  uint16_t port = 0;
  if (!(words >> kind >> version >> address >> port >> hex) || kind != "lockstep-agents" || version != "1")
    return std::nullopt;
  in_addr ignored{};
  const auto token = Token::from_hex(hex);
  if (!token || port == 0 || ::inet_pton(AF_INET, address.c_str(), &ignored) != 1) return std::nullopt;
  return Rendezvous{address, port, *token};
}

}  // namespace lockstep::launcher
