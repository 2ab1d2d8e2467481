#pragma once

#include <cmath>
#include <cstdint>

#include "normformer/core/host_device.h"
#include "normformer/core/philox.h"

namespace normformer::ops {

// The draws of normformer/ops/random_fill.h for element `index` of a logical matrix.

NF_HOST_DEVICE inline double normal_draw(RandomStream stream, uint64_t index, double std) {
  constexpr double kTwoPi = 6.283185307179586476925286766559;
  const auto words = stream.words(index / 2);
  const bool second = index % 2 == 1;
  const double a = to_unit_open(second ? words[2] : words[0]);
  const double b = to_unit_open(second ? words[3] : words[1]);
  return std * std::sqrt(-2.0 * std::log(a)) * std::cos(kTwoPi * b);
}

NF_HOST_DEVICE inline double uniform_draw(RandomStream stream, uint64_t index, double bound) {
  return bound * (2.0 * to_unit_open(stream.words(index / 4)[index % 4]) - 1.0);
}

}  // namespace normformer::ops
