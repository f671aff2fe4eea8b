#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <optional>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <lockstep/base/log.h>
#include <lockstep/base/unique_handle.h>
#include <lockstep/metrics/endpoint.h>

#include "http.h"

namespace lockstep::metrics {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kMaxConnections = 16;
constexpr milliseconds kGrace{100};  // a connection's own when others wait for its place
constexpr milliseconds kRest{250};   // after accept() failed: no spinning while files are short
constexpr int kBacklog = 128;        // those who wait their turn, in the kernel
constexpr int kLowestPriority = 19;  // training comes first

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
  bool is_loopback = false;

  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

std::optional<Address> parse_address(const std::string& text, int port) {
  Address address;
  sockaddr_in v4{};
  sockaddr_in6 v6{};
  if (inet_pton(AF_INET, text.c_str(), &v4.sin_addr) == 1) {
    v4.sin_family = AF_INET;
    v4.sin_port = htons(static_cast<uint16_t>(port));
    address.is_loopback = ntohl(v4.sin_addr.s_addr) >> 24 == 127;
    address.size = sizeof(v4);
    std::memcpy(&address.storage, &v4, sizeof(v4));
    return address;
  }
  if (inet_pton(AF_INET6, text.c_str(), &v6.sin6_addr) != 1) return std::nullopt;
  v6.sin6_family = AF_INET6;
  v6.sin6_port = htons(static_cast<uint16_t>(port));
  address.is_loopback = IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr) != 0;
  address.size = sizeof(v6);
  std::memcpy(&address.storage, &v6, sizeof(v6));
  return address;
}

int port_of(int fd) {
  Address address;
  address.size = sizeof(address.storage);
  if (getsockname(fd, address.get(), &address.size) != 0) return 0;
  const auto* v4 = reinterpret_cast<const sockaddr_in*>(&address.storage);
  const auto* v6 = reinterpret_cast<const sockaddr_in6*>(&address.storage);
  return ntohs(address.storage.ss_family == AF_INET ? v4->sin_port : v6->sin6_port);
}

bool is_for_later() { return errno == EAGAIN || errno == EINTR; }

// One client: its request, then our answer, then whatever it still sends, unread, until it hangs up. To close before
// would reset the connection and could take the answer with it.
class Connection {
 public:
  Connection(UniqueFd fd, Clock::time_point since) : fd_(std::move(fd)), since_(since) {}

  int fd() const { return fd_.get(); }
  int16_t events() const { return answer_.empty() ? POLLIN : POLLOUT; }
  Clock::time_point since() const { return since_; }

  /// After poll() found something. @param answer makes one of a verdict. @return whether there is more to do.
  template <typename Answer>
  bool go_on(Answer answer) {
    if (!answer_.empty()) return send_answer();
    std::array<char, 4096> chunk;
    const ssize_t n = recv(fd_.get(), chunk.data(), std::min(chunk.size(), kMaxRequestBytes - request_.size()), 0);
    if (n <= 0) return n < 0 && is_for_later();
    if (is_answered_) return true;
    request_.append(chunk.data(), static_cast<size_t>(n));
    const Verdict verdict = judge_request(request_);
    if (verdict.status == 0) return true;
    request_.clear();
    answer_ = answer(verdict);
    return send_answer();
  }

  /// Its time is over, or its place is needed.
  void give_up() {
    if (is_answered_ || !answer_.empty()) return;
    answer_ = http_refusal(408);
    send_answer();
  }

 private:
  bool send_answer() {
    const ssize_t n = send(fd_.get(), answer_.data(), answer_.size(), MSG_NOSIGNAL);
    if (n < 0) return is_for_later();
    answer_.erase(0, static_cast<size_t>(n));
    if (!answer_.empty()) return true;
    is_answered_ = true;
    return shutdown(fd_.get(), SHUT_WR) == 0;
  }

  UniqueFd fd_;
  Clock::time_point since_;
  std::string request_, answer_;  // what has arrived; what is still to be sent
  bool is_answered_ = false;
};

}  // namespace

bool is_address(const std::string& text) { return parse_address(text, 0).has_value(); }

class Endpoint::Impl {
 public:
  Impl(const EndpointOptions& options, const RunMeter& meter)
      : options_(options), meter_(meter), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!wake_) {
      LOG(WARNING) << "no metrics: " << std::strerror(errno);
      return;
    }
    listen();
    thread_ = std::jthread([this](const std::stop_token& stop) { serve(stop); });
  }

  int port() const { return port_; }

 private:
  void listen();
  std::string open(Address address);
  void serve(const std::stop_token& stop);
  void wait();
  void accept_waiting();
  bool has_room(Clock::time_point now) const;
  Clock::time_point next_event(Clock::time_point now) const;
  std::string answer(const Verdict& verdict) const;

  EndpointOptions options_;
  const RunMeter& meter_;
  UniqueFd wake_, listener_;
  std::vector<Connection> connections_;  // the oldest first
  std::vector<pollfd> polled_;           // wake_, listener_, connections_
  Clock::time_point rest_until_{};       // of accept(), or of trying to listen
  bool has_warned_ = false;
  std::atomic<int> port_{0};
  std::jthread thread_;  // last: it uses the others
};

void Endpoint::Impl::listen() {
  const auto where = [this](int port) { return "metrics at " + options_.bind + " port " + std::to_string(port); };
  const auto address = parse_address(options_.bind, options_.port);
  const std::string problem = address ? open(*address) : "no IPv4 or IPv6 address";
  if (!problem.empty()) {
    rest_until_ = Clock::now() + options_.retry;
    LOG_IF(WARNING, !std::exchange(has_warned_, true))
        << "no " << where(options_.port) << ": " << problem << "; training goes on, and the port is tried again every "
        << options_.retry.count() / 1000 << " s. Mend: another --metrics_port, or --metrics_textfile";
    return;
  }
  port_ = port_of(listener_.get());
  LOG(INFO) << where(port_) << ": /metrics and /healthz";
  if (!address->is_loopback)
    LOG(WARNING) << where(port_) << " are not guarded: whoever reaches this address can read them. Mend: "
                 << "--metrics_bind=127.0.0.1 and a proxy that asks who is there";
}

std::string Endpoint::Impl::open(Address address) {
  UniqueFd fd(socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int on = 1;  // a restart does not wait for the connections of the start before
  if (!fd || setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) != 0 ||
      bind(fd.get(), address.get(), address.size) != 0 || ::listen(fd.get(), kBacklog) != 0)
    return std::string(std::strerror(errno)) + " (errno " + std::to_string(errno) + ")";
  listener_ = std::move(fd);
  return "";
}

void Endpoint::Impl::serve(const std::stop_token& stop) {
  setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kLowestPriority);
  const std::stop_callback wake(stop, [this] { eventfd_write(wake_.get(), 1); });
  while (!stop.stop_requested()) {
    wait();
    // What has arrived counts, even when this thread came too late to look.
    const auto now = Clock::now();
    size_t i = 2;
    std::erase_if(connections_, [&](Connection& connection) {
      const bool is_ready = polled_[i++].revents != 0;
      if (is_ready && !connection.go_on([this](const Verdict& verdict) { return answer(verdict); })) return true;
      if (now < connection.since() + options_.deadline) return false;
      connection.give_up();
      return true;
    });
    if (!listener_ && now >= rest_until_) listen();
    if (listener_ && polled_[1].revents != 0) accept_waiting();
  }
}

void Endpoint::Impl::wait() {
  const auto now = Clock::now();
  polled_.assign({{wake_.get(), POLLIN, 0}, {has_room(now) ? listener_.get() : -1, POLLIN, 0}});
  for (const Connection& connection : connections_) polled_.push_back({connection.fd(), connection.events(), 0});
  const auto next = next_event(now);
  const bool is_idle = next == Clock::time_point::max();
  poll(polled_.data(), polled_.size(),
       is_idle ? -1 : std::max(0, static_cast<int>(std::chrono::ceil<milliseconds>(next - now).count())));
}

// When something is due though nobody moves.
Clock::time_point Endpoint::Impl::next_event(Clock::time_point now) const {
  auto next = Clock::time_point::max();
  if (rest_until_ > now || !listener_) next = rest_until_;
  if (connections_.empty()) return next;
  next = std::min(next, connections_.front().since() + options_.deadline);
  const auto grace_ends = connections_.front().since() + kGrace;
  return connections_.size() == kMaxConnections && now < grace_ends ? std::min(next, grace_ends) : next;
}

bool Endpoint::Impl::has_room(Clock::time_point now) const {
  if (listener_ && now < rest_until_) return false;
  return connections_.size() < kMaxConnections || now >= connections_.front().since() + kGrace;
}

void Endpoint::Impl::accept_waiting() {
  for (auto now = Clock::now(); has_room(now); now = Clock::now()) {
    UniqueFd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      if (!is_for_later() && errno != ECONNABORTED) rest_until_ = now + kRest;
      return;
    }
    if (connections_.size() == kMaxConnections) {
      connections_.front().give_up();
      connections_.erase(connections_.begin());
    }
    connections_.emplace_back(std::move(fd), now);
  }
}

std::string Endpoint::Impl::answer(const Verdict& verdict) const {
  if (verdict.status != 200) return http_refusal(verdict.status, verdict.is_head);
  if (verdict.page == Page::kMetrics) return http_answer(200, meter_.exposition(), verdict.is_head, true);
  const Health health = meter_.health();
  return http_answer(health.is_good ? 200 : 503, health.text + "\n", verdict.is_head);
}

Endpoint::Endpoint(const EndpointOptions& options, const RunMeter& meter)
    : impl_(std::make_unique<Impl>(options, meter)) {}
Endpoint::~Endpoint() = default;
int Endpoint::port() const { return impl_->port(); }

}  // namespace lockstep::metrics
