#pragma once

#include <algorithm>
#include <cstdint>

#include "normformer/core/checked.h"

namespace normformer::ops {

/// How sums over rows are cut: into blocks that depend on the number of rows alone, each summed row by row,
/// then added in order. The bits of such a sum do not depend on the number of threads.
struct RowBlocks {
  int64_t rows_per_block = 1;
  int64_t count = 0;

  explicit RowBlocks(int64_t rows)
      : rows_per_block(std::max(kLeastRows, ceil_div(rows, kMostBlocks))),
        count(ceil_div(rows, rows_per_block)) {}

 private:
  static constexpr int64_t kLeastRows = 16;    // fewer rows than this and adding the blocks would show
  static constexpr int64_t kMostBlocks = 128;  // bounds the memory of partial sums
};

/// Rows of a loop without sums over rows that one thread takes at a time.
inline int64_t row_grain(int64_t columns) {
  constexpr int64_t kElements = 1 << 16;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, columns));
}

}  // namespace normformer::ops
