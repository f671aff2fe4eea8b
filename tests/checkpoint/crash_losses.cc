#include "crash_losses.h"

#include <algorithm>

namespace lockstep {
namespace {

using Loss = CrashFs::Loss;

constexpr size_t kSector = 512, kPage = 4096;  // what a disk writes whole, and what a kernel does

// The ways in which a part of an unsynced write is lost.
std::vector<Loss> tears(const CrashFs& fs, size_t number) {
  std::vector<Loss> losses;
  const CrashFs::Operation& operation = fs.operation(number);
  if (operation.kind != CrashFs::Operation::Kind::kWrite) return losses;
  const size_t size = operation.bytes.size();
  for (size_t cut = kSector; cut < size; cut += kSector) {
    losses.push_back({number, cut, size});
    losses.push_back({number, 0, cut});
  }
  for (const size_t block : {kSector, kPage}) {
    for (size_t begin = block; begin + block < size; begin += block) losses.push_back({number, begin, begin + block});
  }
  return losses;
}

class Enumeration {
 public:
  Enumeration(const CrashFs& fs, size_t prefix, int64_t stride,
              const std::function<void(const std::vector<Loss>&)>& visit)
      : unsynced_(fs.unsynced(prefix)), stride_(stride), visit_(visit) {
    for (const size_t number : unsynced_) {
      for (const Loss& loss : tears(fs, number)) tears_.push_back(loss);
    }
  }

  void run() {
    visit_({});
    visit_(all_but(CrashFs::kNever, CrashFs::kNever));
    for (size_t i = 0; i < unsynced_.size(); ++i) {
      visit_({Loss{unsynced_[i]}});
      visit_(all_but(unsynced_[i], CrashFs::kNever));
      for (size_t j = i + 1; j < unsynced_.size(); ++j) {
        if (!has_turn()) continue;
        visit_({Loss{unsynced_[i]}, Loss{unsynced_[j]}});
        visit_(all_but(unsynced_[i], unsynced_[j]));
      }
    }
    for (const Loss& tear : tears_) run_torn(tear);
  }

 private:
  void run_torn(const Loss& tear) {
    visit_({tear});
    std::vector<Loss> others = all_but(tear.operation, CrashFs::kNever);
    others.insert(std::upper_bound(others.begin(), others.end(), tear), tear);
    visit_(others);
    for (const size_t number : unsynced_) {
      if (number == tear.operation || !has_turn()) continue;
      visit_(number < tear.operation ? std::vector<Loss>{Loss{number}, tear} : std::vector<Loss>{tear, Loss{number}});
    }
  }

  std::vector<Loss> all_but(size_t one, size_t other) const {
    std::vector<Loss> losses;
    for (const size_t number : unsynced_) {
      if (number != one && number != other) losses.push_back(Loss{number});
    }
    return losses;
  }

  bool has_turn() { return turn_++ % stride_ == 0; }

  std::vector<size_t> unsynced_;
  std::vector<Loss> tears_;
  int64_t stride_, turn_ = 0;
  const std::function<void(const std::vector<Loss>&)>& visit_;
};

}  // namespace

void for_each_loss(const CrashFs& fs, size_t prefix, int64_t stride,
                   const std::function<void(const std::vector<Loss>&)>& visit) {
  Enumeration(fs, prefix, stride, visit).run();
}

}  // namespace lockstep
