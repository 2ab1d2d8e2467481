#pragma once

#include "normformer/core/checked.h"

namespace normformer {

/// The part of a logical matrix that a local tensor holds. A vector of n elements is the matrix [n, 1].
struct Rectangle {
  Range rows;
  Range columns{0, 1};
  int64_t global_rows = 0;
  int64_t global_columns = 1;

  int64_t numel() const { return rows.size() * columns.size(); }
  bool is_whole() const { return rows == Range{0, global_rows} && columns == Range{0, global_columns}; }
  bool operator==(const Rectangle&) const = default;
};

}  // namespace normformer
