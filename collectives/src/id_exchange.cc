#include "id_exchange.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <list>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <netdb.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr uint64_t kRequestMagic = 0x315145524b434f4c, kAnswerMagic = 0x31534e414b434f4c;  // "LOCKREQ1", "LOCKANS1"
constexpr milliseconds kPause{10};       // between two looks at a file or two attempts to connect
constexpr milliseconds kPatience{2000};  // a connection without a whole request for so long is nobody's
constexpr size_t kStrangers = 64;        // connections beyond the world's own that may be open at once

struct Request {
  uint64_t magic, job, nonce;
  uint32_t world_size, rank, length, zero;
};
struct Answer {
  uint64_t magic, job, nonce;
  uint32_t world_size, length;
};
static_assert(sizeof(Request) == 40 && sizeof(Answer) == 32);

uint64_t hash(const std::string& text) {  // FNV-1a
  uint64_t value = 0xcbf29ce484222325;
  for (const char c : text) value = (value ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  return value;
}

// One rank's view of the exchange.
struct Exchange {
  const MeetingPlace& place;
  int rank, world_size;
  std::span<std::byte> id;
  milliseconds timeout;
  Clock::time_point deadline;

  bool is_over() const { return Clock::now() >= deadline; }
  std::string doing() const {
    return "[rank " + std::to_string(rank) + "/" + std::to_string(world_size) + "] exchanging NCCL's id " +
           place.describe();
  }

  Request request() const {
    std::random_device random;
    return {kRequestMagic,
            hash(place.job),
            uint64_t{random()} << 32 | random(),
            static_cast<uint32_t>(world_size),
            static_cast<uint32_t>(rank),
            static_cast<uint32_t>(id.size()),
            0};
  }

  // Whether this is a rank of ours; one that is, but disagrees on the sizes, is answered and complains itself.
  bool is_ours(const Request& request) const {
    return request.magic == kRequestMagic && request.job == hash(place.job) && request.rank > 0 &&
           (request.world_size != static_cast<uint32_t>(world_size) ||
            request.rank < static_cast<uint32_t>(world_size));
  }

  std::vector<std::byte> answer_to(const Request& request) const {
    const Answer answer{kAnswerMagic, request.job, request.nonce, static_cast<uint32_t>(world_size),
                        static_cast<uint32_t>(id.size())};
    std::vector<std::byte> bytes(sizeof(Answer) + id.size());
    std::memcpy(bytes.data(), &answer, sizeof(Answer));
    std::copy(id.begin(), id.end(), bytes.begin() + sizeof(Answer));
    return bytes;
  }

  void check_sizes(const Answer& answer) const {
    if (answer.world_size == static_cast<uint32_t>(world_size) && answer.length == id.size()) return;
    throw ConfigError(doing() + ": rank 0 has world_size " + std::to_string(answer.world_size) + " and an id of " +
                      std::to_string(answer.length) + " bytes, this rank " + std::to_string(world_size) + " and " +
                      std::to_string(id.size()) + ". Mend: start all ranks alike, with one build");
  }

  [[noreturn]] void time_out(const std::string& state) const {
    throw CollectiveError(doing() + " timed out after " + std::to_string(timeout.count()) + " ms: " + state +
                          ". Mend: read the first ERROR of the ranks that are missing");
  }
};

std::string list_absent(const std::vector<bool>& served) {
  std::string absent;
  for (size_t rank = 1; rank < served.size(); ++rank) {
    if (!served[rank]) absent += (absent.empty() ? "rank " : ", ") + std::to_string(rank);
  }
  return absent + " did not come";
}

// --- by TCP ---------------------------------------------------------------------------------------------------------

struct AddressDeleter {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};

std::unique_ptr<addrinfo, AddressDeleter> resolve(const Exchange& exchange) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int code =
      getaddrinfo(exchange.place.host.c_str(), std::to_string(exchange.place.port).c_str(), &hints, &found);
  if (code != 0) {
    throw ConfigError(exchange.doing() + ": the host is not known (" + gai_strerror(code) +
                      "). Mend: set MASTER_ADDR to the name or address of rank 0's node");
  }
  return std::unique_ptr<addrinfo, AddressDeleter>(found);
}

bool wait_for(int fd, int16_t events, milliseconds patience) {
  pollfd entry{fd, events, 0};
  return poll(&entry, 1, static_cast<int>(std::max<int64_t>(0, patience.count()))) > 0;
}

UniqueFd try_to_listen(const addrinfo& address, bool any_address) {
  UniqueFd socket(::socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) return socket;
  sockaddr_storage bound{};
  std::memcpy(&bound, address.ai_addr, address.ai_addrlen);
  if (any_address && bound.ss_family == AF_INET) {
    reinterpret_cast<sockaddr_in&>(bound).sin_addr.s_addr = htonl(INADDR_ANY);
  }
  if (any_address && bound.ss_family == AF_INET6) reinterpret_cast<sockaddr_in6&>(bound).sin6_addr = in6addr_any;
  const int yes = 1;
  setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));  // the port of a start just before is free
  if (bind(socket.get(), reinterpret_cast<sockaddr*>(&bound), address.ai_addrlen) != 0 ||
      listen(socket.get(), SOMAXCONN) != 0) {
    return UniqueFd();
  }
  return socket;
}

// The address itself where it is this node's, so that a loopback job is not to be seen from outside; else all of them.
UniqueFd listen_at(const Exchange& exchange) {
  const auto addresses = resolve(exchange);
  for (const bool any_address : {false, true}) {
    for (const addrinfo* address = addresses.get(); address != nullptr; address = address->ai_next) {
      UniqueFd socket = try_to_listen(*address, any_address);
      if (socket) return socket;
      if (errno != EADDRNOTAVAIL) {
        throw ConfigError(exchange.doing() + ": cannot listen: " + std::strerror(errno) +
                          ". Mend: set MASTER_PORT to a free port, or LOCKSTEP_ID_FILE to a path all ranks see");
      }
    }
  }
  throw ConfigError(exchange.doing() + ": no address to listen at. Mend: set MASTER_ADDR to rank 0's node");
}

// One open connection at rank 0: reads a request, writes the answer, reads the thanks.
class Visitor {
 public:
  explicit Visitor(UniqueFd fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }
  int16_t wants() const { return outgoing_.empty() ? POLLIN : POLLOUT; }
  bool is_stale() const { return !is_known_ && Clock::now() > arrived_ + kPatience; }

  enum class State { kOpen, kServed, kGone };
  State advance(const Exchange& exchange) { return outgoing_.empty() ? read_some(exchange) : write_some(); }
  uint32_t rank() const { return request_.rank; }

 private:
  State read_some(const Exchange& exchange) {
    auto* into = is_answered_ ? reinterpret_cast<char*>(&thanks_) : reinterpret_cast<char*>(&request_);
    const size_t wanted = is_answered_ ? sizeof(thanks_) : sizeof(request_);
    const ssize_t n = recv(fd(), into + received_, wanted - received_, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return State::kOpen;
    if (n <= 0) return State::kGone;
    received_ += static_cast<size_t>(n);
    if (received_ < wanted) return State::kOpen;
    if (is_answered_) return agrees_ ? State::kServed : State::kGone;
    if (!exchange.is_ours(request_)) return State::kGone;
    is_known_ = true;
    agrees_ = request_.world_size == static_cast<uint32_t>(exchange.world_size);
    outgoing_ = exchange.answer_to(request_);
    return State::kOpen;
  }

  State write_some() {
    const ssize_t n = send(fd(), outgoing_.data(), outgoing_.size(), MSG_NOSIGNAL);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return State::kOpen;
    if (n < 0) return State::kGone;
    outgoing_.erase(outgoing_.begin(), outgoing_.begin() + n);
    if (outgoing_.empty()) {
      is_answered_ = true;
      received_ = 0;
    }
    return State::kOpen;
  }

  UniqueFd fd_;
  Request request_{};
  char thanks_ = 0;
  size_t received_ = 0;
  bool is_known_ = false, agrees_ = false, is_answered_ = false;
  std::vector<std::byte> outgoing_;
  Clock::time_point arrived_ = Clock::now();
};

void serve_by_tcp(const Exchange& exchange) {
  const UniqueFd listener = listen_at(exchange);
  std::list<Visitor> visitors;
  std::vector<bool> served(exchange.world_size, false);
  served[0] = true;
  while (std::find(served.begin(), served.end(), false) != served.end()) {
    if (exchange.is_over()) exchange.time_out(list_absent(served));
    std::vector<pollfd> entries{{listener.get(), POLLIN, 0}};
    for (const Visitor& visitor : visitors) entries.push_back({visitor.fd(), visitor.wants(), 0});
    poll(entries.data(), entries.size(), static_cast<int>(kPause.count()));
    size_t entry = 1;
    for (auto visitor = visitors.begin(); visitor != visitors.end(); ++entry) {
      const auto state = entries[entry].revents != 0 ? visitor->advance(exchange) : Visitor::State::kOpen;
      if (state == Visitor::State::kServed) served[visitor->rank()] = true;
      visitor = state != Visitor::State::kOpen || visitor->is_stale() ? visitors.erase(visitor) : std::next(visitor);
    }
    UniqueFd caller(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (caller && visitors.size() < kStrangers + served.size()) visitors.emplace_back(std::move(caller));
  }
}

UniqueFd try_to_connect(const addrinfo& address) {
  UniqueFd socket(::socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) return socket;
  int error = connect(socket.get(), address.ai_addr, address.ai_addrlen) == 0 ? 0 : errno;
  if (error == EINPROGRESS && wait_for(socket.get(), POLLOUT, kPatience)) {
    socklen_t size = sizeof(error);
    getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  }
  errno = error;
  return error == 0 ? std::move(socket) : UniqueFd();
}

// Reads exactly `bytes` before the deadline; false when the peer closed, or stayed silent.
bool read_all(int fd, std::span<std::byte> bytes, Clock::time_point deadline) {
  while (!bytes.empty()) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
    if (left.count() <= 0 || !wait_for(fd, POLLIN, left)) return false;
    const ssize_t n = recv(fd, bytes.data(), bytes.size(), 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
  return true;
}

// One visit at rank 0. @return what went wrong and may go right at the next attempt, or nothing.
std::optional<std::string> visit(const Exchange& exchange, const addrinfo& address) {
  const UniqueFd socket = try_to_connect(address);
  if (!socket) return std::string("cannot connect: ") + std::strerror(errno);
  const Request request = exchange.request();
  if (send(socket.get(), &request, sizeof(request), MSG_NOSIGNAL) != sizeof(request))
    return std::string("cannot send: ") + std::strerror(errno);
  Answer answer{};
  const auto deadline = std::min(exchange.deadline, Clock::now() + kPatience);
  if (!read_all(socket.get(), std::as_writable_bytes(std::span(&answer, 1)), deadline))
    return "it took the connection but gave no answer: is another job listening there?";
  if (answer.magic != kAnswerMagic || answer.nonce != request.nonce) {
    throw ConfigError(exchange.doing() +
                      ": what answers there is not our rank 0. Mend: set MASTER_PORT to a port of this job alone");
  }
  exchange.check_sizes(answer);
  std::vector<std::byte> id(answer.length);
  if (!read_all(socket.get(), id, deadline)) return "the answer ended early";
  const char thanks = 1;
  if (send(socket.get(), &thanks, 1, MSG_NOSIGNAL) != 1) return std::string("cannot send: ") + std::strerror(errno);
  std::copy(id.begin(), id.end(), exchange.id.begin());
  return std::nullopt;
}

void ask_by_tcp(const Exchange& exchange) {
  const auto addresses = resolve(exchange);
  for (std::string trouble;;) {
    for (const addrinfo* address = addresses.get(); address != nullptr; address = address->ai_next) {
      const auto result = visit(exchange, *address);
      if (!result) return;
      trouble = *result;
    }
    if (exchange.is_over()) exchange.time_out(trouble);
    std::this_thread::sleep_for(kPause);
  }
}

// --- by file --------------------------------------------------------------------------------------------------------

std::string request_path(const Exchange& exchange, int rank) {
  return exchange.place.file + "." + std::to_string(rank);
}
std::string answer_path(const Exchange& exchange, int rank) { return request_path(exchange, rank) + ".answer"; }

// Whole or not at all, over whatever an earlier start left there.
void put_file(const Exchange& exchange, const std::string& path, std::span<const std::byte> bytes) {
  const std::string draft = path + ".new";
  unlink(draft.c_str());
  const UniqueFd file(open(draft.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!file) throw IoError(exchange.doing() + ": creating", draft, errno);
  if (write(file.get(), bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
    throw IoError(exchange.doing() + ": writing", draft, errno);
  if (rename(draft.c_str(), path.c_str()) != 0) throw IoError(exchange.doing() + ": renaming", draft, errno);
}

// The file's first bytes.size() bytes; false while it is not there, or is not a file of ours to read.
bool get_file(const std::string& path, std::span<std::byte> bytes) {
  const UniqueFd file(open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat status {};
  return file && fstat(file.get(), &status) == 0 && S_ISREG(status.st_mode) &&
         read(file.get(), bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size());
}

// A request that goes away after its answer was there has been served; a new nonce in it means that the one answered
// was left over from an earlier start.
void serve_by_file(const Exchange& exchange) {
  std::vector<bool> served(exchange.world_size, false);
  std::vector<std::optional<uint64_t>> answered(exchange.world_size);
  served[0] = true;
  for (int rank = 1; rank < exchange.world_size; ++rank) unlink(answer_path(exchange, rank).c_str());
  while (std::find(served.begin(), served.end(), false) != served.end()) {
    if (exchange.is_over()) exchange.time_out(list_absent(served));
    for (int rank = 1; rank < exchange.world_size; ++rank) {
      Request request{};
      if (served[rank]) continue;
      if (!get_file(request_path(exchange, rank), std::as_writable_bytes(std::span(&request, 1)))) {
        served[rank] = answered[rank].has_value();
      } else if (exchange.is_ours(request) && answered[rank] != request.nonce) {
        put_file(exchange, answer_path(exchange, rank), exchange.answer_to(request));
        answered[rank] = request.nonce;
      }
    }
    std::this_thread::sleep_for(kPause);
  }
  for (int rank = 1; rank < exchange.world_size; ++rank) unlink(answer_path(exchange, rank).c_str());
}

void ask_by_file(const Exchange& exchange) {
  const Request request = exchange.request();
  const std::string asked = request_path(exchange, exchange.rank), answered = answer_path(exchange, exchange.rank);
  put_file(exchange, asked, std::as_bytes(std::span(&request, 1)));
  Answer answer{};
  std::vector<std::byte> bytes(sizeof(Answer) + exchange.id.size());
  for (;;) {
    if (get_file(answered, std::as_writable_bytes(std::span(&answer, 1))) && answer.magic == kAnswerMagic &&
        answer.nonce == request.nonce) {
      exchange.check_sizes(answer);
      if (get_file(answered, bytes)) break;
    }
    if (exchange.is_over()) {
      unlink(asked.c_str());
      exchange.time_out("rank 0 gave no answer");
    }
    std::this_thread::sleep_for(kPause);
  }
  std::copy(bytes.begin() + sizeof(Answer), bytes.end(), exchange.id.begin());
  unlink(asked.c_str());
}

}  // namespace

std::string MeetingPlace::describe() const {
  return file.empty() ? "at " + host + ":" + std::to_string(port) : "in file " + file;
}

MeetingPlace meeting_place(const Environment& environment) {
  MeetingPlace place;
  place.job = environment("TORCHELASTIC_RUN_ID").value_or(environment("SLURM_JOB_ID").value_or("")) + "/" +
              environment("TORCHELASTIC_RESTART_COUNT").value_or("0");
  place.file = environment("LOCKSTEP_ID_FILE").value_or("");
  if (!place.file.empty()) return place;
  const auto host = environment("MASTER_ADDR"), port = environment("MASTER_PORT");
  if (!host || !port) {
    throw ConfigError(
        "without MPI the ranks must be told where to meet. Mend: set MASTER_ADDR and MASTER_PORT (torchrun does), or "
        "LOCKSTEP_ID_FILE to a path that all ranks see");
  }
  const auto [end, error] = std::from_chars(port->data(), port->data() + port->size(), place.port);
  if (error != std::errc() || end != port->data() + port->size() || place.port < 1 || place.port > 65534)
    throw ConfigError("MASTER_PORT='" + *port + "' is no port. Mend: set it to a number from 1 to 65534");
  place.host = *host;
  if (environment("TORCHELASTIC_USE_AGENT_STORE") == "True") ++place.port;
  return place;
}

void exchange_id(const MeetingPlace& place, int rank, int world_size, std::span<std::byte> id, milliseconds timeout) {
  if (world_size == 1) return;
  const Exchange exchange{place, rank, world_size, id, timeout, Clock::now() + timeout};
  if (place.file.empty()) {
    rank == 0 ? serve_by_tcp(exchange) : ask_by_tcp(exchange);
  } else {
    rank == 0 ? serve_by_file(exchange) : ask_by_file(exchange);
  }
}

}  // namespace lockstep
