#pragma once

#include <array>
#include <cstdint>

#include "normformer/core/philox.h"

namespace normformer {

/// A pseudo-random permutation of [0, size) that takes no memory: any element in O(1).
///
/// A Feistel network over pairs (left, right) with left < a, right < b and a·b just above `size`, additions
/// modulo a and b, Philox as its round function; images outside of [0, size) are permuted again until they
/// fall inside. Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2
/// and 3.
class Permutation {
 public:
  /// The permutation of [0, size), size > 0, that belongs to `stream`.
  Permutation(RandomStream stream, int64_t size);

  int64_t size() const { return static_cast<int64_t>(size_); }
  /// Where element `index` of [0, size) goes.
  int64_t operator()(int64_t index) const;

 private:
  uint64_t round_value(uint64_t half, uint64_t round) const;
  uint64_t permute_once(uint64_t value) const;

  RandomStream stream_;
  uint64_t size_;
  uint64_t left_size_;   ///< a
  uint64_t right_size_;  ///< b, a·b >= size
};

/// The endless order in which the `num_samples` samples of one dataset are taken: every epoch takes each
/// once, in an order of its own. A pure function of the index.
class SampleOrder {
 public:
  /// Shuffled anew each epoch by `stream`.
  static SampleOrder shuffled(RandomStream stream, int64_t num_samples);
  /// As they lie on disk, over and over.
  static SampleOrder sequential(int64_t num_samples);

  int64_t num_samples() const { return num_samples_; }
  /// The sample at place `index` >= 0 of the order; index / num_samples() is its epoch.
  int64_t at(int64_t index) const;

 private:
  SampleOrder(RandomStream stream, int64_t num_samples, bool shuffled);

  RandomStream stream_;
  int64_t num_samples_;
  bool shuffled_;
};

}  // namespace normformer
