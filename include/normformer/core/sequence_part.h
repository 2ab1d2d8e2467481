#pragma once

#include <cstdint>

#include "normformer/core/checked.h"

namespace normformer {

/// The tokens of a sequence that are held somewhere, in the order of their rows there: two runs of positions,
/// the first before the second. Either may be empty.
struct SequencePart {
  Range first;
  Range second;

  /// All of a sequence.
  static constexpr SequencePart whole(int64_t length) { return {{0, length}, {length, length}}; }

  constexpr int64_t size() const { return first.size() + second.size(); }

  /// Where in the sequence row `row` belongs, 0 <= row < size().
  constexpr int64_t position_of(int64_t row) const {
    return row < first.size() ? first.begin + row : second.begin + (row - first.size());
  }

  /// How many of its rows are of positions below `position`. Rows ascend, so these are its first.
  constexpr int64_t rows_before(int64_t position) const {
    if (position < second.begin) return clamp(position - first.begin, first.size());
    return first.size() + clamp(position - second.begin, second.size());
  }

  bool operator==(const SequencePart&) const = default;

 private:
  static constexpr int64_t clamp(int64_t count, int64_t most) {
    if (count < 0) return 0;
    return count < most ? count : most;
  }
};

}  // namespace normformer
