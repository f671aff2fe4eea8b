#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <new>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/process.h>
#include <lockstep/base/unique_handle.h>
#include <lockstep/flight/ring.h>

#include "clock.h"
#include "rules.h"
#include "text.h"

namespace lockstep::flight {
namespace {

constexpr const char* kFolder = "/dev/shm";
constexpr std::string_view kPrefix = "lockstep-";

constexpr size_t kMostTimed = 128;    // steps whose times are kept
constexpr uint64_t kLeastTimed = 10;  // before which no step time is known: the first ones warm up
constexpr uint64_t kWorldId = 1;

struct Label {
  int32_t bucket = -1;
  std::string_view text;
};
thread_local Label g_label;

// Which of Header::waits is this thread's. More threads than slots share them, which hides a wait at worst.
size_t wait_slot() {
  static std::atomic<size_t> next{0};
  thread_local const size_t slot = next.fetch_add(1) % kMaxWaits;
  return slot;
}

uint64_t mix(uint64_t hash, uint64_t word) {  // splitmix64's finalizer
  uint64_t x = hash ^ (word + 0x9e3779b97f4a7c15ULL + (hash << 6) + (hash >> 2));
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

bool is_alive(const Header& header) {
  const auto stat = read_stat(header.pid);
  return stat && stat->state != 'Z' && stat->start_time == header.pid_start_time;
}

// A file that is no ring of ours, or only half made, is left alone.
bool is_dead_ring(int file) {
  struct stat found {};
  if (::fstat(file, &found) != 0 || !S_ISREG(found.st_mode) || found.st_uid != ::geteuid()) return false;
  alignas(Header) std::array<std::byte, sizeof(Header)> bytes{};
  if (::pread(file, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) return false;
  const auto& header = *reinterpret_cast<const Header*>(bytes.data());
  return header.magic.load() == kMagic && header.pid_namespace == pid_namespace() && !is_alive(header);
}

}  // namespace

const char* name_of(State state) {
  constexpr std::array<const char*, 4> kNames = {"starting", "ready", "running", "ended"};
  return static_cast<size_t>(state) < kNames.size() ? kNames[static_cast<size_t>(state)] : "unknown";
}

const char* name_of(Phase phase) {
  constexpr std::array<const char*, 6> kNames = {"starting", "loading", "training", "evaluating", "saving", "ending"};
  return static_cast<size_t>(phase) < kNames.size() ? kNames[static_cast<size_t>(phase)] : "unknown";
}

const char* name_of(Op op) {
  constexpr std::array<const char*, 13> kNames = {
      "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "barrier", "show",
      "show_done",  "split",          "close",      "send",       "recv",      "start"};
  return static_cast<size_t>(op) < kNames.size() ? kNames[static_cast<size_t>(op)] : "unknown";
}

const char* name_of(Dtype dtype) {
  constexpr std::array<const char*, 9> kNames = {"", "f32", "f64", "bf16", "f16", "i32", "i64", "u8", "other"};
  return static_cast<size_t>(dtype) < kNames.size() ? kNames[static_cast<size_t>(dtype)] : "unknown";
}

uint64_t fingerprint_after(uint64_t before, const Call& call) {
  const auto kind = static_cast<uint64_t>(call.op) | static_cast<uint64_t>(call.dtype) << 8 |
                    static_cast<uint64_t>(call.reduction) << 16 |
                    static_cast<uint64_t>(static_cast<uint32_t>(call.root)) << 32;
  return mix(mix(before, kind), static_cast<uint64_t>(call.count));
}

LabelScope::LabelScope(int32_t bucket, std::string_view label)
    : bucket_before_(g_label.bucket), label_before_(g_label.text) {
  g_label = {bucket, label};
}

LabelScope::~LabelScope() { g_label = {bucket_before_, label_before_}; }

std::string job_key(const Environment& environment) {
  const auto value = [&](const char* name) { return environment(name).value_or("") + "\n"; };
  std::string job = value("PMIX_NAMESPACE");
  if (job == "\n" && environment("SLURM_STEP_ID")) job = value("SLURM_JOB_ID") + value("SLURM_STEP_ID");
  if (job == "\n" && environment("TORCHELASTIC_RUN_ID"))
    job = value("TORCHELASTIC_RUN_ID") + value("MASTER_PORT") + value("TORCHELASTIC_RESTART_COUNT");
  if (job == "\n") job = std::to_string(::getpid());
  job += value("SLURM_NODEID") + std::to_string(::geteuid());  // nodes of a test cluster may share one /dev/shm
  uint64_t hash = 0;
  for (const char c : job) hash = mix(hash, static_cast<unsigned char>(c));
  std::string key(16, '0');
  for (char& digit : key) digit = "0123456789abcdef"[hash & 15], hash >>= 4;
  return key;
}

std::string ring_path(const std::string& job_key, int rank) {
  return std::string(kFolder) + "/" + std::string(kPrefix) + job_key + "-" + std::to_string(rank);
}

std::vector<std::string> find_rings(const std::string& job_key) {
  std::vector<std::string> paths;
  std::error_code ignored;
  const std::string prefix = std::string(kPrefix) + job_key;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder, ignored)) {
    if (entry.path().filename().string().rfind(prefix, 0) == 0) paths.push_back(entry.path());
  }
  return paths;
}

void sweep_rings() {
  for (const std::string& path : find_rings("")) {
    const UniqueFd file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (file && is_dead_ring(file.get())) ::unlink(path.c_str());
  }
}

// Of the rank itself: nobody else reads it.
struct Ring::StepTimes {
  std::atomic<uint64_t> waited{0};       // ticks, in all; the rest is for the thread that trains
  std::atomic<bool> is_disturbed{true};  // something other than training came between
  uint64_t step_begin = 0, waited_before = 0, count = 0;
  std::array<uint64_t, kMostTimed> wall{};
  std::array<uint64_t, kStragglerSteps> compute{}, window{};
  dev_t device = 0;
  ino_t inode = 0;

  void add(uint64_t now, Header& header) {
    const uint64_t total = waited.load(std::memory_order_relaxed);
    const bool counts = !is_disturbed.exchange(false) && step_begin != 0;
    if (counts) {
      const uint64_t took = now - step_begin, waits = std::min(took, total - waited_before);
      wall[count % kMostTimed] = took;
      window[count % kStragglerSteps] = took;
      compute[count++ % kStragglerSteps] = took - waits;
      publish(header);
    }
    step_begin = now;
    waited_before = total;
  }

  void publish(Header& header) const {
    const auto sum = [](const auto& ticks) {
      uint64_t total = 0;
      for (const uint64_t value : ticks) total += value;
      return total;
    };
    header.compute.store(sum(compute), std::memory_order_relaxed);
    header.wall.store(sum(window), std::memory_order_relaxed);
    if (count >= kLeastTimed) {
      std::array<uint64_t, kMostTimed> sorted = wall;
      const size_t n = std::min<size_t>(count, kMostTimed), at = (n * 99 + 99) / 100 - 1;
      std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(at),
                       sorted.begin() + static_cast<std::ptrdiff_t>(n));
      header.step_p99.store(sorted[at], std::memory_order_relaxed);
    }
    header.timed_steps.store(count, std::memory_order_release);
  }
};

Ring::Ring(RingFile* file, std::string path)
    : file_(file), path_(std::move(path)), steps_(std::make_unique<StepTimes>()) {}

std::unique_ptr<Ring> Ring::create(const std::string& path, const RankInfo& info) {
  const UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!file) throw IoError("making the flight ring", path, errno);
  // Reserved now: a full /dev/shm is an error here and no SIGBUS in a collective.
  void* memory = MAP_FAILED;
  int error = ::posix_fallocate(file.get(), 0, sizeof(RingFile));
  if (error == 0) {
    memory = ::mmap(nullptr, sizeof(RingFile), PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory == MAP_FAILED) error = errno;
  }
  if (error != 0) {
    ::unlink(path.c_str());
    throw IoError("making the flight ring", path, error);
  }
  auto ring = std::unique_ptr<Ring>(new Ring(new (memory) RingFile, path));
  struct stat made {};
  ::fstat(file.get(), &made);
  ring->steps_->device = made.st_dev;
  ring->steps_->inode = made.st_ino;
  Header& header = ring->header();
  header.version = kVersion;
  header.clock = g_ticks_are_tsc ? 1 : 0;
  header.pid = ::getpid();
  header.pid_start_time = read_stat(header.pid).value_or(ProcessStat()).start_time;
  header.pid_namespace = pid_namespace();
  header.rank = info.rank;
  header.world_size = info.world_size;
  header.local_rank = info.local_rank;
  header.local_size = info.local_size;
  header.node_rank = info.node_rank;
  ::gethostname(header.host.data(), header.host.size() - 1);
  header.step = static_cast<uint64_t>(-1);
  header.magic.store(kMagic, std::memory_order_release);
  return ring;
}

Ring::~Ring() {
  struct stat found {};
  const bool is_ours =
      ::stat(path_.c_str(), &found) == 0 && found.st_dev == steps_->device && found.st_ino == steps_->inode;
  if (is_ours) ::unlink(path_.c_str());
  ::munmap(static_cast<void*>(file_), sizeof(RingFile));
}

std::unique_ptr<Ring::Group> Ring::add_world() {
  std::vector<int32_t> members(static_cast<size_t>(header().world_size));
  for (size_t i = 0; i < members.size(); ++i) members[i] = static_cast<int32_t>(i);
  return add(kWorldId, "world", std::move(members));
}

std::unique_ptr<Ring::Group> Ring::add_child(Group& parent, int color, const std::string& name,
                                             std::vector<int32_t> members) {
  const uint64_t id = mix(mix(parent.id_, ++parent.num_splits_), static_cast<uint64_t>(color));
  return add(id, name, std::move(members));
}

std::unique_ptr<Ring::Group> Ring::add(uint64_t id, std::string name, std::vector<int32_t> members) {
  auto group = std::make_unique<Group>();
  group->id_ = id;
  group->fingerprint_ = id;
  group->name_ = std::move(name);
  group->members_ = std::move(members);
  const uint32_t slot = header().num_groups.load(std::memory_order_relaxed);
  if (slot == kMaxGroups) return group;
  group->slot_ = static_cast<uint16_t>(slot);
  group->record_ = &file_->groups[slot];
  describe_members(*group);
  group->record_->id = id;
  group->record_->fingerprint = id;
  set_text(group->record_->name, group->name_);
  header().num_groups.store(slot + 1, std::memory_order_release);
  return group;
}

void Ring::describe_members(Group& group) noexcept {
  GroupRecord& record = *group.record_;
  const std::vector<int32_t>& members = group.members_;
  record.size = static_cast<int32_t>(members.size());
  const auto me = std::find(members.begin(), members.end(), header().rank);
  record.rank = static_cast<int32_t>(me - members.begin());
  record.first = members.empty() ? 0 : members[0];
  record.stride = members.size() > 1 ? members[1] - members[0] : 1;
  bool is_progression = true;
  for (size_t i = 1; i < members.size(); ++i)
    is_progression = is_progression && members[i] - members[i - 1] == record.stride;
  const uint32_t used = header().num_members.load(std::memory_order_relaxed);
  if (is_progression) {
    record.stride = std::max(record.stride, 1);
    record.members_at = kMaxMembers + 1;
  } else if (used + members.size() > kMaxMembers) {
    record.members_at = kMaxMembers;
  } else {
    std::copy(members.begin(), members.end(), file_->members.begin() + used);
    record.members_at = used;
    header().num_members.store(used + static_cast<uint32_t>(members.size()), std::memory_order_relaxed);
  }
}

namespace {

void put_label(std::array<Word, kEntryWords>& words) noexcept {
  const size_t bytes = std::min(g_label.text.size(), kLabelBytes - 1);
  if (bytes == 0) return words[kLabelWord].store(0, std::memory_order_release);
  for (size_t at = 0; at <= bytes; at += 8) {  // the last word has the zero that ends it
    uint64_t word = 0;
    std::memcpy(&word, g_label.text.data() + at, std::min<size_t>(8, bytes - at));
    words[kLabelWord + at / 8].store(word, std::memory_order_release);
  }
}

}  // namespace

uint64_t Ring::begin(Group& group, const Call& call) noexcept {
  const uint64_t ticket = header().next_ticket.fetch_add(1, std::memory_order_relaxed);
  uint64_t sequence = 0;
  if (is_message(call.op)) {
    sequence = ++group.messages_;
  } else {
    sequence = ++group.sequence_;
    group.fingerprint_ = fingerprint_after(group.fingerprint_, call);
  }
  auto& words = file_->entries[ticket % kNumEntries].words;
  // Each store releases those before it: whoever sees one of these words sees the odd lock too.
  const auto put = [&](size_t at, uint64_t word) { words[at].store(word, std::memory_order_release); };
  put(0, 2 * ticket + 1);
  put(1, 0);
  put(2, ticks());
  put(3, sequence);
  put(4, group.fingerprint_);
  put(5, static_cast<uint64_t>(call.count));
  put(6, group.slot_ | static_cast<uint64_t>(call.op) << 16 | static_cast<uint64_t>(call.dtype) << 24 |
             static_cast<uint64_t>(static_cast<uint32_t>(g_label.bucket)) << 32);
  put(7, static_cast<uint32_t>(call.root) | static_cast<uint64_t>(call.reduction) << 32);
  put_label(words);
  put(0, 2 * ticket + 2);
  if (GroupRecord* record = group.record_; record != nullptr) {
    if (is_message(call.op)) {
      record->messages.store(sequence, std::memory_order_release);
    } else {
      record->last_ticket.store(ticket, std::memory_order_relaxed);
      record->fingerprint.store(group.fingerprint_, std::memory_order_relaxed);
      record->begun.store(sequence, std::memory_order_release);
    }
  }
  return ticket;
}

void Ring::wait(uint64_t ticket) noexcept {
  auto& [waited_for, since] = header().waits[wait_slot()];
  since.store(ticks(), std::memory_order_relaxed);
  waited_for.store(ticket + 1, std::memory_order_release);
}

void Ring::done(uint64_t ticket) noexcept {
  const uint64_t now = ticks();
  auto& [waited_for, since] = header().waits[wait_slot()];
  if (waited_for.load(std::memory_order_relaxed) == ticket + 1) {
    waited_for.store(0, std::memory_order_release);
    steps_->waited.fetch_add(now - since.load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
  auto& words = file_->entries[ticket % kNumEntries].words;
  // Not where 2,048 calls have begun since: the entry is another's.
  if (words[0].load(std::memory_order_relaxed) == 2 * ticket + 2) words[1].store(now, std::memory_order_release);
}

void Ring::leave(uint64_t ticket) noexcept {
  auto& waited_for = header().waits[wait_slot()][0];
  if (waited_for.load(std::memory_order_relaxed) == ticket + 1) waited_for.store(0, std::memory_order_release);
}

void Ring::set_state(State state) noexcept {
  header().state.store(static_cast<uint32_t>(state), std::memory_order_release);
}

void Ring::set_phase(Phase phase) noexcept {
  if (phase != Phase::kTraining) steps_->is_disturbed = true;
  header().phase.store(static_cast<uint32_t>(phase), std::memory_order_release);
}

Phase Ring::phase() const noexcept { return static_cast<Phase>(file_->header.phase.load(std::memory_order_relaxed)); }

void Ring::set_step(int64_t step) noexcept {
  steps_->add(ticks(), header());
  header().step.store(static_cast<uint64_t>(step), std::memory_order_release);
}

void Ring::set_hang_timeout_s(double seconds) noexcept {
  header().hang_timeout_ns.store(static_cast<uint64_t>(seconds * 1e9), std::memory_order_relaxed);
}

void Ring::set_folder(const std::string& folder) noexcept {
  if (folder.size() < header().folder.size()) set_text(header().folder, folder);
}

void Ring::set_exit(int code, std::string_view message) noexcept {
  if (header().exit_kind.load(std::memory_order_relaxed) != 0) return;  // the first cause is the one that counts
  header().exit_value = code;
  set_text(header().exit_message, message);
  header().exit_kind.store(1, std::memory_order_release);
  set_state(State::kEnded);
}

void Ring::set_died(int signal) noexcept {
  if (header().exit_kind.load(std::memory_order_relaxed) != 0) return;
  header().exit_value = signal;
  header().exit_kind.store(2, std::memory_order_release);
}

}  // namespace lockstep::flight
