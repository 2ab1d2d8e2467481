#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace normformer {

/// The random numbers of Python's random.Random(seed) for whole seeds below 2^32: the Mersenne Twister
/// MT19937, initialised by an array. Source: Matsumoto and Nishimura, "Mersenne Twister: a 623-dimensionally
/// equidistributed uniform pseudo-random number generator", ACM TOMACS 8 (1998), and their init_by_array of
/// 2002.
class PythonRandom {
 public:
  explicit PythonRandom(uint32_t seed);

  /// random(): at least 0, below 1, with 53 bits.
  double next();

 private:
  static constexpr std::size_t kWords = 624;

  uint32_t word();
  void renew();

  std::array<uint32_t, kWords> state_;
  std::size_t used_ = kWords;
};

}  // namespace normformer
