#pragma once

#include <algorithm>
#include <cstdint>

#include "normformer/core/error.h"

namespace normformer {

/// a * b; throws LogicError where it leaves int64. Use for every size that comes from a shape or a file.
inline int64_t checked_mul(int64_t a, int64_t b) {
  int64_t product = 0;
  NF_CHECK(!__builtin_mul_overflow(a, b, &product), "{} x {} leaves 64 bits", a, b);
  return product;
}

/// a + b; throws LogicError where it leaves int64.
inline int64_t checked_add(int64_t a, int64_t b) {
  int64_t sum = 0;
  NF_CHECK(!__builtin_add_overflow(a, b, &sum), "{} + {} leaves 64 bits", a, b);
  return sum;
}

/// The smallest integer >= a / b, for a >= 0 and b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

/// The smallest multiple of `step` that is >= a, for a >= 0 and step > 0.
constexpr int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }

/// A half-open interval [begin, end) of indices.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  constexpr int64_t size() const { return end - begin; }
  constexpr bool empty() const { return end <= begin; }
  constexpr bool contains(int64_t i) const { return begin <= i && i < end; }
  bool operator==(const Range&) const = default;
};

/// What two intervals share; empty (begin == end) where they share nothing.
constexpr Range intersect(Range a, Range b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

/// Part `index` of [0, total) cut into `parts` runs whose sizes differ by at most one, the larger ones first.
/// The one rule by which every uneven split in this program is made.
constexpr Range even_part(int64_t total, int64_t parts, int64_t index) {
  const int64_t base = total / parts;
  const int64_t extra = total % parts;
  const int64_t begin = index * base + std::min(index, extra);
  return {begin, begin + base + (index < extra ? 1 : 0)};
}

}  // namespace normformer
