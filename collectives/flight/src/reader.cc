#include <algorithm>
#include <climits>
#include <cstring>

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <lockstep/base/process.h>
#include <lockstep/base/unique_handle.h>
#include <lockstep/flight/report.h>

#include "clock.h"
#include "text.h"

namespace lockstep::flight {
namespace {

// Both clocks and rates are this machine's (layout.h).
int64_t to_ns(uint64_t ticks) { return static_cast<int64_t>(static_cast<double>(ticks) / ticks_per_ns()); }
int64_t age_ns(uint64_t now, uint64_t then) { return now > then ? to_ns(now - then) : 0; }

Liveness liveness_of(const Header& header) {
  const auto stat = read_stat(header.pid);
  if (!stat || stat->start_time != header.pid_start_time) return Liveness::kGone;
  switch (stat->state) {
    case 'Z':
    case 'X':
      return Liveness::kGone;
    case 'T':
    case 't':
      return Liveness::kStopped;
    case 'D':
      return Liveness::kUninterruptible;
    default:
      return stat->state == 'R' ? Liveness::kRunning : Liveness::kSleeping;
  }
}

std::optional<CallReport> read_entry(const RingFile& file, uint64_t ticket, uint64_t now) {
  const auto& shared = file.entries[ticket % kNumEntries].words;
  std::array<uint64_t, kEntryWords> words{};
  for (size_t i = 0; i < kEntryWords; ++i) words[i] = shared[i].load(std::memory_order_acquire);
  if (words[0] != 2 * ticket + 2 || shared[0].load(std::memory_order_relaxed) != words[0]) return std::nullopt;
  CallReport report;
  report.ticket = ticket;
  report.sequence = words[3];
  report.fingerprint = words[4];
  report.call.count = static_cast<int64_t>(words[5]);
  const auto slot = static_cast<uint16_t>(words[6]);
  if (slot < kMaxGroups) report.group = file.groups[slot].id;
  report.call.op = static_cast<Op>(words[6] >> 16 & 0xff);
  report.call.dtype = static_cast<Dtype>(words[6] >> 24 & 0xff);
  report.bucket = static_cast<int32_t>(words[6] >> 32);
  report.call.root = static_cast<int32_t>(words[7]);
  report.call.reduction = static_cast<Reduction>(words[7] >> 32 & 0xff);
  std::array<char, kLabelBytes> label{};
  std::memcpy(label.data(), &words[kLabelWord], kLabelBytes);
  report.label = text_of(label);
  report.begun_ago_ns = age_ns(now, words[2]);
  report.done_ago_ns = words[1] == 0 ? -1 : age_ns(now, words[1]);
  return report;
}

std::vector<int32_t> members_of(const RingFile& file, const GroupRecord& group) {
  const auto size = static_cast<size_t>(std::clamp(group.size, 0, 1 << 20));
  std::vector<int32_t> members(size);
  if (group.members_at > kMaxMembers) {
    for (size_t i = 0; i < size; ++i) members[i] = group.first + static_cast<int32_t>(i) * group.stride;
  } else if (group.members_at + size <= kMaxMembers) {
    for (size_t i = 0; i < size; ++i) members[i] = static_cast<int32_t>(file.members[group.members_at + i]);
  } else {
    members.clear();
  }
  return members;
}

long futex_wake(std::atomic<uint32_t>& word) {
  return ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

const char* name_of(Liveness liveness) {
  constexpr std::array<const char*, 5> kNames = {"running", "sleeping", "in the kernel", "stopped", "gone"};
  return static_cast<size_t>(liveness) < kNames.size() ? kNames[static_cast<size_t>(liveness)] : "unknown";
}

std::unique_ptr<RingReader> RingReader::open(const std::string& path) {
  const UniqueFd file(::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat found {};
  if (!file || ::fstat(file.get(), &found) != 0 || !S_ISREG(found.st_mode) || found.st_uid != ::geteuid() ||
      found.st_size != sizeof(RingFile)) {
    return nullptr;
  }
  void* memory = ::mmap(nullptr, sizeof(RingFile), PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (memory == MAP_FAILED) return nullptr;
  auto reader = std::unique_ptr<RingReader>(new RingReader(static_cast<RingFile*>(memory)));
  const Header& header = reader->header();
  const bool is_whole = header.magic.load(std::memory_order_acquire) == kMagic && header.version == kVersion &&
                        header.clock == (g_ticks_are_tsc ? 1U : 0U);
  return is_whole ? std::move(reader) : nullptr;
}

RingReader::~RingReader() { ::munmap(static_cast<void*>(file_), sizeof(RingFile)); }

RankReport RingReader::read(size_t tail) const {
  const Header& header = file_->header;
  RankReport report;
  report.rank = header.rank;
  report.world_size = header.world_size;
  report.pid = header.pid;
  report.liveness = liveness_of(header);
  if (report.liveness == Liveness::kStopped || report.liveness == Liveness::kUninterruptible)
    report.wchan = read_wchan(header.pid);
  // Waits before calls: whoever left a wait meanwhile has its call done, and is not taken to hang.
  const uint64_t now = ticks();
  for (const auto& [waited_for, since] : header.waits) {
    const uint64_t ticket = waited_for.load(std::memory_order_acquire);
    if (ticket != 0) report.waits.push_back({ticket - 1, age_ns(now, since.load(std::memory_order_relaxed))});
  }
  report.state = static_cast<State>(header.state.load(std::memory_order_acquire));
  report.phase = static_cast<Phase>(header.phase.load(std::memory_order_relaxed));
  report.step = static_cast<int64_t>(header.step.load(std::memory_order_relaxed));
  report.beats = header.beats.load(std::memory_order_relaxed);
  report.hang_timeout_ns = static_cast<int64_t>(header.hang_timeout_ns.load(std::memory_order_relaxed));
  report.step_p99_ns = to_ns(header.step_p99.load(std::memory_order_relaxed));
  report.timed_steps = static_cast<int64_t>(header.timed_steps.load(std::memory_order_acquire));
  report.compute_ns = to_ns(header.compute.load(std::memory_order_relaxed));
  report.wall_ns = to_ns(header.wall.load(std::memory_order_relaxed));
  report.exit_kind = header.exit_kind.load(std::memory_order_acquire);
  report.exit_value = header.exit_value;
  if (report.exit_kind != 0) report.exit_message = text_of(header.exit_message);
  if (header.stack_number.load(std::memory_order_acquire) != 0) report.stack = text_of(header.stack);
  const uint64_t end = header.next_ticket.load(std::memory_order_acquire);
  const uint64_t count = std::min<uint64_t>({end, tail, kNumEntries});
  for (uint64_t ticket = end - count; ticket < end; ++ticket) {
    if (auto call = read_entry(*file_, ticket, now)) report.calls.push_back(std::move(*call));
  }
  // Groups after calls: none that a call names is missing.
  const size_t num_groups = std::min<size_t>(header.num_groups.load(std::memory_order_acquire), kMaxGroups);
  for (size_t i = 0; i < num_groups; ++i) {
    const GroupRecord& group = file_->groups[i];
    report.groups.push_back(
        {group.id, text_of(group.name), members_of(*file_, group), group.begun.load(std::memory_order_acquire),
         group.messages.load(std::memory_order_relaxed), group.fingerprint.load(std::memory_order_relaxed)});
  }
  return report;
}

bool RingReader::is_quiet() const {
  const auto waits = [](const auto& wait) { return wait[0].load(std::memory_order_relaxed) != 0; };
  return file_->header.exit_kind.load(std::memory_order_relaxed) != 2 &&
         std::none_of(file_->header.waits.begin(), file_->header.waits.end(), waits);
}

bool RingReader::is_gone() const { return liveness_of(file_->header) == Liveness::kGone; }
std::string RingReader::host() const { return text_of(file_->header.host); }
std::string RingReader::folder() const { return text_of(file_->header.folder); }

void RingReader::tell_to_end(std::string_view verdict) const {
  set_text(file_->header.order_text, verdict);
  file_->header.order.store(static_cast<uint32_t>(Order::kEndAsHung), std::memory_order_release);
  file_->header.notice_number.fetch_add(1, std::memory_order_release);
  futex_wake(file_->header.notice_number);
}

void RingReader::give_notice(std::string_view text) const {
  set_text(file_->header.notice, text);
  file_->header.notice_number.fetch_add(1, std::memory_order_release);
  futex_wake(file_->header.notice_number);
}

}  // namespace lockstep::flight
