#pragma once

#include <cstdint>

namespace lockstep::data {

/// The order of samples as a pure function of (seed, epoch, position): a keyed permutation of 0 .. size-1 that needs no
/// memory. A Feistel network over the next even power of two, walked until the value falls inside (cycle walking).
/// Source: J. Black, P. Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, doi:10.1007/3-540-45760-7_9.
class GlobalOrder {
 public:
  GlobalOrder(int64_t size, uint64_t seed);
  /// The sample at `position`, counted over all epochs: epoch = position / size, each sample once an epoch.
  int64_t sample_at(int64_t position) const;

 private:
  int64_t size_;
  uint64_t seed_;
  int half_bits_;
};

}  // namespace lockstep::data
