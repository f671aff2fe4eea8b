#include "shm_memory.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <string>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kLeastArena = int64_t{64} << 20;
constexpr int64_t kMostAddresses = int64_t{1} << 45;  // of the 2^47 a process has, for all arenas together

int64_t pages(int64_t bytes) { return std::max(kPage, (bytes + kPage - 1) / kPage * kPage); }

// What a rank tells the others about its arena. The token lies at the arena's start too: whoever maps it knows that it
// has the right one.
struct Card {
  int64_t pid = 0, fd = -1, size = 0;
  uint64_t token[2] = {};
  int error = 0;  // errno
  char doing[60] = {};
};

std::nullptr_t failed(Card& card, const char* doing) {
  card.error = errno;
  std::strncpy(card.doing, doing, sizeof(card.doing) - 1);
  return nullptr;
}

std::byte* map_arena(int fd, int64_t size) {
  void* base = mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) return nullptr;
  madvise(base, static_cast<size_t>(size), MADV_DONTDUMP);
  madvise(base, static_cast<size_t>(size), MADV_HUGEPAGE);  // where the machine allows it for shared memory
  return static_cast<std::byte*>(base);
}

int64_t wanted_size(int ranks) {
  const int64_t memory = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
  return std::max(kLeastArena, pages(std::min(memory, kMostAddresses / ranks)));
}

// Creates this rank's arena. @return its address, or null with the reason on the card.
std::byte* create(Card& card, UniqueFd& fd, int ranks) {
  fd.reset(memfd_create("lockstep", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return failed(card, "creating shared memory");
  card.size = wanted_size(ranks);
  if (fchmod(fd.get(), 0600) != 0 || ftruncate(fd.get(), card.size) != 0) return failed(card, "sizing shared memory");
  fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);  // a page that was there stays there
  std::byte* base = map_arena(fd.get(), card.size);
  if (base == nullptr) return failed(card, "mapping shared memory");
  std::random_device random;
  for (uint64_t& word : card.token) word = uint64_t{random()} << 32 | random();
  std::memcpy(base, card.token, sizeof(card.token));
  card.pid = getpid();
  card.fd = fd.get();
  return base;
}

// Maps a peer's arena. @return its address, or null with the reason on our card.
std::byte* open_peer(const Card& peer, Card& mine) {
  const std::string path = "/proc/" + std::to_string(peer.pid) + "/fd/" + std::to_string(peer.fd);
  const UniqueFd fd(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) return failed(mine, "opening a peer's shared memory");
  struct stat info {};
  std::byte* base = fstat(fd.get(), &info) == 0 && info.st_size == peer.size ? map_arena(fd.get(), peer.size) : nullptr;
  if (base != nullptr && std::memcmp(base, peer.token, sizeof(peer.token)) == 0) return base;
  if (base != nullptr) munmap(base, static_cast<size_t>(peer.size));
  return failed(mine, "mapping a peer's shared memory");
}

std::vector<Card> exchange(ProcessGroup& control, const Card& mine) {
  const std::string all = all_gather_bytes(control, std::as_bytes(std::span(&mine, 1)));
  std::vector<Card> cards(control.size());
  std::memcpy(cards.data(), all.data(), all.size());
  return cards;
}

}  // namespace

std::shared_ptr<ShmMemory> ShmMemory::make(ProcessGroup& control) {
  Card mine;
  UniqueFd fd;  // open until all have mapped it
  std::vector<Arena> arenas(control.size());
  arenas[control.rank()].base = create(mine, fd, control.size());
  std::vector<Card> cards = exchange(control, mine);
  const bool all_created = std::all_of(cards.begin(), cards.end(), [](const Card& card) { return card.error == 0; });
  for (int rank = 0; rank < control.size(); ++rank) {
    arenas[rank].size = cards[rank].size;
    if (all_created && rank != control.rank()) arenas[rank].base = open_peer(cards[rank], mine);
    if (mine.error != 0) break;
  }
  std::shared_ptr<ShmMemory> memory(new ShmMemory(control.rank(), std::move(arenas)));
  cards = exchange(control, mine);
  for (int rank = 0; rank < control.size(); ++rank) {
    if (cards[rank].error == 0) continue;
    throw ConfigError("rank " + std::to_string(rank) + " of " + control.name() + ": " + cards[rank].doing +
                      " failed: " + std::strerror(cards[rank].error) +
                      ". Mend: --backend=mpi, or let the ranks of a node run as one user in one container");
  }
  return memory;
}

ShmMemory::ShmMemory(int rank, std::vector<Arena> arenas) : rank_(rank), arenas_(std::move(arenas)) {
  if (arenas_[rank_].size > kPage) free_[kPage] = arenas_[rank_].size - kPage;  // the first one holds the token
}

ShmMemory::~ShmMemory() {
  for (const Arena& arena : arenas_) {
    if (arena.base != nullptr) munmap(arena.base, static_cast<size_t>(arena.size));
  }
}

std::optional<int64_t> ShmMemory::offset_of(const void* data, int64_t bytes) const {
  const Arena& mine = arenas_[rank_];
  const auto* start = static_cast<const std::byte*>(data);
  if (start < mine.base || start + bytes > mine.base + mine.size) return std::nullopt;
  return start - mine.base;
}

ShmMemory::Block ShmMemory::allocate(int64_t bytes) {
  const int64_t size = pages(bytes);
  const std::lock_guard lock(mutex_);
  const auto hole = std::find_if(free_.begin(), free_.end(), [&](const auto& one) { return one.second >= size; });
  if (hole == free_.end()) return {};
  const auto [offset, room] = *hole;
  if (offset + size > touched_) {  // so that a machine without memory says so here, and not by SIGBUS later
    const int64_t begin = std::max(offset, touched_);
    std::byte* fresh = arenas_[rank_].base + begin;
    if (madvise(fresh, static_cast<size_t>(offset + size - begin), MADV_POPULATE_WRITE) != 0 && errno != EINVAL)
      return {};
    touched_ = offset + size;
  }
  free_.erase(hole);
  if (room > size) free_[offset + size] = room - size;
  used_[offset] = size;
  return {shared_from_this(), offset};
}

void ShmMemory::give_back(int64_t offset) {
  const std::lock_guard lock(mutex_);
  const auto block = used_.find(offset);
  auto hole = free_.emplace(offset, block->second).first;
  used_.erase(block);
  if (const auto next = std::next(hole); next != free_.end() && hole->first + hole->second == next->first) {
    hole->second += next->second;
    free_.erase(next);
  }
  if (hole == free_.begin()) return;
  if (const auto before = std::prev(hole); before->first + before->second == hole->first) {
    before->second += hole->second;
    free_.erase(hole);
  }
}

}  // namespace lockstep
