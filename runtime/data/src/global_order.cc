#include <bit>

#include <lockstep/base/counter_random.h>
#include <lockstep/base/error.h>
#include <lockstep/data/global_order.h>

namespace lockstep::data {
namespace {

constexpr uint64_t kRounds = 4;  // enough for a shuffle; nobody attacks it

}  // namespace

GlobalOrder::GlobalOrder(int64_t size, uint64_t seed) : size_(size), seed_(seed) {
  LOCKSTEP_CHECK(size > 0) << "an order of " << size << " samples";
  const auto bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(size - 1)));
  half_bits_ = bits <= 2 ? 1 : (bits + 1) / 2;
}

int64_t GlobalOrder::sample_at(int64_t position) const {
  LOCKSTEP_CHECK(position >= 0) << "position " << position;
  const auto epoch = static_cast<uint64_t>(position / size_);
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  auto value = static_cast<uint64_t>(position % size_);
  do {  // fewer than four walks on average: the network covers less than four times the samples
    uint64_t left = value >> half_bits_, right = value & mask;
    for (uint64_t round = 0; round < kRounds; ++round) {
      const uint64_t mixed = left ^ (stream_key(seed_, epoch, round, right) & mask);
      left = right;
      right = mixed;
    }
    value = left << half_bits_ | right;
  } while (value >= static_cast<uint64_t>(size_));
  return static_cast<int64_t>(value);
}

}  // namespace lockstep::data
