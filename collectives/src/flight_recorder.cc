#include "flight_recorder.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <thread>

#include <dlfcn.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cxxabi.h>
#include <execinfo.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>

#include "agent_start.h"
#include "watched_group.h"

namespace lockstep {
namespace {

using flight::Header;
using flight::Ring;

constexpr std::array<int, 5> kCrashes = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
constexpr int kMostFrames = 48;

// What signal handlers may touch.
std::atomic<Ring*> g_ring{nullptr};
std::array<struct sigaction, kCrashes.size()> g_before;
std::array<void*, kMostFrames> g_frames;
std::atomic<int> g_num_frames{0};
std::array<char, 65536> g_crash_stack;

void wake(std::atomic<uint32_t>& word) { ::syscall(SYS_futex, &word, FUTEX_WAKE, 1, nullptr, nullptr, 0); }

// Addresses only: names are looked up by the thread that is not where this one hangs.
void take_stack(int) {
  Ring* ring = g_ring.load();
  if (ring == nullptr) return;
  const int saved = errno;
  g_num_frames = ::backtrace(g_frames.data(), kMostFrames);
  auto& bell = ring->header().notice_number;
  bell.fetch_add(1, std::memory_order_release);
  wake(bell);
  errno = saved;
}

void note_crash(int signal) {
  if (Ring* ring = g_ring.load()) ring->set_died(signal);
  const auto which = std::find(kCrashes.begin(), kCrashes.end(), signal) - kCrashes.begin();
  ::sigaction(signal, &g_before[static_cast<size_t>(which)], nullptr);
  ::raise(signal);  // arrives when this handler is left
}

void install_handlers() {
  std::array<void*, 2> frames{};
  ::backtrace(frames.data(), frames.size());  // loads its library: a handler must not
  const stack_t stack{.ss_sp = g_crash_stack.data(), .ss_flags = 0, .ss_size = g_crash_stack.size()};
  ::sigaltstack(&stack, nullptr);  // of the main thread: a stack that overflowed holds no handler
  struct sigaction action {};
  action.sa_flags = SA_RESTART;
  action.sa_handler = &take_stack;
  ::sigaction(SIGUSR2, &action, nullptr);
  action.sa_flags = SA_ONSTACK;
  action.sa_handler = &note_crash;
  for (size_t i = 0; i < kCrashes.size(); ++i) ::sigaction(kCrashes[i], &action, &g_before[i]);
}

std::string frame_text(void* address) {
  Dl_info info{};
  if (::dladdr(address, &info) == 0 || info.dli_fname == nullptr) return "?";
  const std::string file = info.dli_fname, library = file.substr(file.rfind('/') + 1);
  char offset[32];
  if (info.dli_sname == nullptr) {
    std::snprintf(offset, sizeof(offset), "+%#zx",
                  reinterpret_cast<size_t>(address) - reinterpret_cast<size_t>(info.dli_fbase));
    return library + offset;
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : info.dli_sname;
  std::free(demangled);  // NOLINT(cppcoreguidelines-no-malloc)
  if (name.size() > 160) name = name.substr(0, 157) + "...";
  return name + " (" + library + ")";
}

void write_stack(Header& header, int num_frames) {
  std::string text;
  for (int i = 2; i < num_frames; ++i)
    text += frame_text(g_frames[static_cast<size_t>(i)]) + "\n";  // 0 and 1: the handler
  const size_t size = std::min(text.size(), header.stack.size() - 1);
  std::memcpy(header.stack.data(), text.data(), size);
  header.stack[size] = '\0';
  header.stack_number.fetch_add(1, std::memory_order_release);
}

}  // namespace

// Beats once a second, and does what the main thread may not be able to: says where that is, and ends the process.
class FlightRecorder::Answerer {
 public:
  Answerer(Ring& ring, int agent) : ring_(ring), agent_(agent) {
    sigset_t all, before;
    sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the other threads'
    thread_ = std::thread([this] { run(); });
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }
  ~Answerer() {
    is_over_ = true;
    auto& bell = ring_.header().notice_number;
    bell.fetch_add(1, std::memory_order_release);
    wake(bell);
    thread_.join();
    if (agent_ > 0) ::waitpid(agent_, nullptr, WNOHANG);
  }
  Answerer(const Answerer&) = delete;
  Answerer& operator=(const Answerer&) = delete;

 private:
  void run() {
    Header& header = ring_.header();
    for (uint32_t heard = header.notice_number.load(std::memory_order_acquire); !is_over_;) {
      const timespec second{1, 0};
      ::syscall(SYS_futex, &header.notice_number, FUTEX_WAIT, heard, &second, nullptr, 0);
      header.beats.fetch_add(1, std::memory_order_relaxed);
      if (agent_ > 0 && ::waitpid(agent_, nullptr, WNOHANG) != 0) agent_ = -1;
      if (const int frames = g_num_frames.exchange(0); frames > 0) write_stack(header, frames);
      if (header.order.load(std::memory_order_acquire) != 0) end_as_told();
      const uint32_t now = header.notice_number.load(std::memory_order_acquire);
      if (now != heard) log_notice();
      heard = now;
    }
  }

  void log_notice() {
    Header& header = ring_.header();
    if (header.notice[0] == '\0') return;
    LOG(WARNING) << header.notice.data();
    header.notice[0] = '\0';
  }

  // The main thread may hang anywhere: nothing but the end is safe.
  [[noreturn]] void end_as_told() {
    Header& header = ring_.header();
    header.order_seen.store(1, std::memory_order_release);
    constexpr int kHang = static_cast<int>(ExitCode::kHang);
    ring_.set_exit(kHang, "told to end: the job hangs");
    if (header.order_text[0] != '\0') {
      LOG(ERROR) << header.order_text.data();
      google::FlushLogFiles(google::INFO);
    }
    // mpirun 5 drops what was written just before a rank's end; and the one that speaks must not be ended by the
    // others'.
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    ::_exit(kHang);
  }

  Ring& ring_;
  int agent_;
  std::atomic<bool> is_over_{false};
  std::thread thread_;
};

std::unique_ptr<FlightRecorder> FlightRecorder::start(const RankInfo& info, const RuntimeOptions& options) {
  if (info.world_size == 1 || !wants_agent()) return nullptr;  // nobody would look
  const std::string key = flight::job_key(process_environment());
  if (info.local_rank == 0) flight::sweep_rings();
  std::shared_ptr<Ring> ring;
  try {
    ring = Ring::create(flight::ring_path(key, info.rank), info);
  } catch (const IoError& error) {
    LOG(WARNING) << "no hang watchdog for this rank: " << error.what() << ". Mend: room in /dev/shm";
    return nullptr;
  }
  ring->set_hang_timeout_s(options.hang_timeout_s);
  const int agent = info.local_rank == 0 ? start_agent(key, info.local_size) : -1;
  return std::unique_ptr<FlightRecorder>(new FlightRecorder(std::move(ring), agent));
}

FlightRecorder::FlightRecorder(std::shared_ptr<Ring> ring, int agent)
    : ring_(std::move(ring)),
      world_(ring_->add_world()),
      start_(ring_->begin(*world_, {.op = flight::Op::kStart})),
      answerer_(std::make_unique<Answerer>(*ring_, agent)) {
  ring_->wait(start_);
  g_ring = ring_.get();
  install_handlers();
}

std::unique_ptr<ProcessGroup> FlightRecorder::watch(std::unique_ptr<ProcessGroup> world) {
  ring_->done(start_);
  ring_->set_state(flight::State::kRunning);
  ring_->set_phase(flight::Phase::kTraining);  // a body that does not say otherwise
  return watch_world(std::move(world), ring_, std::move(world_));
}

FlightRecorder::~FlightRecorder() {
  g_ring = nullptr;
  answerer_.reset();
}

}  // namespace lockstep
